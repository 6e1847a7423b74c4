// The page of one latent, and of two beside each other.
"use strict";

(() => {
  function histogram(counts) {
    const first = counts.findIndex((n) => n > 0);
    if (first < 0) return el("p", { class: "soft" }, "No code above zero.");
    const last = counts.length - 1 - [...counts].reverse().findIndex((n) => n > 0);
    const from = Math.max(0, first - 1);
    const of = counts.slice(from, Math.min(counts.length, last + 2));
    const [w, h, bottom, left] = [440, 150, 24, 44];
    const most = Math.max(...of);
    const step = (w - left) / of.length;
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    svg.setAttribute("class", "histogram");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Histogram of the codes above zero, ${counts.reduce((a, b) => a + b, 0)} tokens`);
    const add = (tag, attributes, text) => {
      const made = document.createElementNS(ns, tag);
      Object.entries(attributes).forEach(([name, value]) => made.setAttribute(name, value));
      if (text != null) made.textContent = text;
      svg.append(made);
      return made;
    };
    of.forEach((n, i) => {
      if (!n) return;
      const tall = Math.max(1.5, (h - bottom - 12) * (n / most));
      const bar = add("rect", { x: left + i * step + 1, y: h - bottom - tall, width: Math.max(1, step - 2), height: tall });
      const edges = clipsae.meta.edges;
      const said = `${i + from === 0 ? "below" : `from ${digits(edges[i + from - 1], 2)}`}: ${n.toLocaleString("en")} tokens`;
      const title = document.createElementNS(ns, "title");
      title.textContent = said;
      bar.append(title);
    });
    add("line", { x1: left, x2: w, y1: h - bottom + 0.5, y2: h - bottom + 0.5 });
    add("text", { x: left - 6, y: 20, "text-anchor": "end" }, most.toLocaleString("en"));
    add("text", { x: left - 6, y: h - bottom, "text-anchor": "end" }, "0");
    const every = Math.max(1, Math.ceil(of.length / 7));
    for (let i = 1; i < of.length; i += every) {
      const edge = clipsae.meta.edges[i + from - 1];
      if (edge != null) add("text", { x: left + i * step, y: h - 8, "text-anchor": "middle" }, digits(edge, 2));
    }
    return svg;
  }

  function section(title, note, content) {
    return el("section", {}, el("h2", {}, title, note ? el("small", {}, note) : null), content);
  }

  const state = { shown: "" }; // "range": examples across the range, not the strongest

  // A latent that exists, by its text in a link.
  function number(text, of) {
    const m = Number(text);
    if (!Number.isInteger(m) || m < 0 || m >= of.latents || text === "" || text === undefined) {
      throw new Error(`There is no latent ${text}: expected 0 to ${of.latents - 1}.`);
    }
    return m;
  }

  function factsOf(m, of) {
    const c = of.columns;
    return el("dl", { class: "facts" }, ...[
      ...(of.naming ? [["Name", trusted(m, of) ? calledOf(m, of) : "no name"]] : []),
      ...(clipsae.meta.concepts.length ? [["Concept", conceptOf(m, of) || "none stands out"]] : []),
      ["Active on images", percent(c.frequency[m])], ["on tokens", percent(c.tokens[m])], ["Strength", digits(c.strength[m])],
      ["Label", labelOf(m, of)], ["Label entropy", digits(c.entropy[m], 2)], ["MonoSemanticity", digits(c.monosemanticity[m], 2)],
    ].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  // How far its name is to be trusted.
  function told(m, of) {
    const c = of.columns;
    if (!of.naming || !Number.isFinite(c.score[m])) return null;
    const called = `“${calledOf(m, of)}”`;
    const said = of.naming.explained.includes(m) ? `${of.naming.source} calls it ${called}.` : `Of all words ${called} fits best.`;
    return el("p", { class: "soft name-score", style: "margin:8px 0 0" },
      `${said} It tells images that this latent is active on from others with ${digits(c.score[m], 2)} (95 %: ${digits(c.low[m], 2)} to ${digits(c.high[m], 2)}; 0.5 is chance), names of other latents in its place with ${digits(c.control[m], 2)}. `
      + (trusted(m, of) ? "The name can be trusted." : `No name, as the low end is not above ${digits(of.naming.threshold, 2)}, which 95 % of other latents' names stay below.`));
  }

  // Its examples: the strongest, or some of all.
  function pictures(data, frames, onchange = () => {}) {
    const kinds = [["", "Strongest", data], ["range", "Across its range", data.range]].filter(([, , of]) => of.images.length);
    const place = el("div", {});
    const buttons = kinds.map(([kind, said]) => el("button", { type: "button", "data-kind": kind, onclick: () => { state.shown = kind; renew(); onchange(); } }, said));
    function renew() {
      const [kind, , of] = kinds.find(([name]) => name === state.shown) || kinds[0];
      frames.length = 0;
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.kind === kind)));
      place.replaceChildren(examples(of, frames));
    }
    if (kinds.length) renew();
    return [el("div", { class: "row", role: "group", "aria-label": "Which examples" }, ...buttons), place];
  }

  clipsae.views.latent = async ([text], link) => {
    const of = clipsae.here;
    const m = number(text, of);
    const meta = clipsae.meta;
    state.shown = link.get("examples") || state.shown;
    const c = of.columns;
    const data = await clipsae.latent(m, of);
    const next = (by) => { const other = clipsae.beside(m, by); if (other !== null) go(to(`latent/${other}`)); };
    const head = el("div", { class: "row" },
      el("h1", {}, `Latent ${m}`),
      el("span", { class: "soft" }, meaning(m)),
      steps("latent", next));
    const kept = clipsae.kept.tools(m, data);
    const keys = (event) => {
      if (event.key === "ArrowLeft" || event.key === "k") next(-1);
      else if (event.key === "ArrowRight" || event.key === "j") next(1);
      else if (event.key === "n") kept.mark();
      else if (event.key === "h" && heat) heat.next();
      else return false;
      return true;
    };
    let heat = null;
    if (!data) return { element: el("div", { class: "page" }, head, el("p", {}, "Dead: no token of these images makes it active.")), keys };

    const k = c.concept[m];
    const [attribute, value] = conceptOf(m).split("=");
    const rows = ["position", "count"].includes(attribute) ? "images" : "patches";
    const explained = k < 0 ? null : el("p", { class: "soft", style: "margin:8px 0 0" },
      `${percent(c.precision[m])} of its activation on ${rows} with a ${attribute} lies on ${value}, where chance would give ${percent(meta.base[k])}: ${digits(c.precision[m] / meta.base[k], 2)} times as much. `
      + `${percent(c.covered[m])} of all its activation lies on ${rows} with a ${attribute}.`);
    const leads = leadsOf(m).map(([k, rank, precision]) => el("div", {},
      el("dt", {}, meta.concepts[k]), el("dd", {}, against(k, precision), el("span", { class: "soft" }, rank ? `, number ${rank + 1}` : ", the first"))));
    const frames = [];
    const [which, shown] = pictures(data, frames, () => remember(`latent/${m}`, { examples: state.shown }));
    heat = heatButtons(() => frames);
    const effects = (data.helps || []).concat(data.hurts || []);
    const largest = Math.max(...effects.map(([, v]) => Math.abs(v)), 1e-9);
    const images = (n) => `${n} image${n === 1 ? "" : "s"}`;
    const classes = (list, kind) => (list.length
      ? bars(list.map(([k, v, n]) => [el("span", { class: "counted", title: meta.classnames[k] }, el("span", {}, meta.classnames[k]), el("span", { class: "soft" }, images(n))), v, signed(v)]), largest, kind)
      : el("p", { class: "soft" }, "none"));
    const top = (list) => (list.length
      ? el("ul", { class: "bars" }, ...list.map(([k, n]) => el("li", {}, el("span", { class: "name", title: meta.classnames[k] }, meta.classnames[k]), el("span"), el("span", { class: "number" }, `n ≥ ${n}`))))
      : el("p", { class: "soft" }, "no class"));
    const card = (k, cosine, link, whose) => el("a", { href: link },
      el("div", { class: "framed" }, thumbnail(whose.columns.image[k])),
      el("div", {}, `${k} `, el("span", { class: "soft" }, cosine.toFixed(2))),
      el("div", { class: "caption soft", title: meaning(k, whose) }, meaning(k, whose)));
    const near = el("div", { class: "near" }, ...data.near.map(([k, cosine]) => card(k, cosine, to(`latent/${k}`), of)));
    const other = el("input", { type: "number", min: 0, max: of.latents - 1, placeholder: "latent", "aria-label": "Latent to show beside this one", style: "width:104px", value: data.near.length ? data.near[0][0] : "" });
    const beside = el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); if (other.value !== "") go(to(`beside/${m}/${Number(other.value)}`)); } },
      el("span", { class: "soft" }, "beside latent"), other, el("button", { type: "submit" }, "compare"));
    const counterparts = [];
    for (const sae of meta.saes) {
      if (sae.name === of.name) continue;
      const whose = await clipsae.dictionary(sae.name);
      const { latent, cosine, chance } = await clipsae.match(of, whose);
      if (latent[m] >= 0) {
        counterparts.push(section(`In ${sae.name}`, cosine[m] > chance ? "the latent with the nearest decoder row" : `no counterpart: the nearest is no nearer than random directions (${digits(chance, 2)})`,
          el("div", { class: "near" }, card(latent[m], cosine[m], to(`beside/${m}/${latent[m]}`, { other: sae.name }), whose))));
      }
    }
    const recipe = `of ${meta.images.toLocaleString("en")} images`;
    const element = el("div", { class: "page" }, head, kept.element, factsOf(m, of), told(m, of), explained,
      leads.length ? section("Leads", "the concepts that few say more about; the share of its activation, and of chance", el("dl", { class: "facts" }, ...leads)) : null,
      section("Images", recipe, el("div", {}, el("div", { class: "row apart" }, which, heat), el("p", { style: "margin:0;height:8px" }), shown)),
      el("div", { class: "columns" },
        section("Codes", "of all tokens, above zero", histogram(data.histogram)),
        data.words && data.words.length ? section("Words", "that its examples are nearest to; soft-WPMI in nats", bars(data.words.map(([k, v]) => [of.naming.words[k], v - Math.min(...data.words.map(([, w]) => w), 0), v.toFixed(2)]), Math.max(...data.words.map(([, v]) => v)) - Math.min(...data.words.map(([, v]) => v), 0))) : null,
        data.helps ? section("Helps", `with it the true class's margin is larger by this; seen on ${images(data.seen)}`, classes(data.helps, "good")) : null,
        data.hurts ? section("Hurts", "with it the true class's margin is smaller by this", classes(data.hurts, "bad")) : null,
        data.kept ? section("Top-n", "on_n keeps it for", top(data.kept)) : null),
      data.near.length ? section("Nearest", "by the cosine of decoder rows", near) : null, ...counterparts,
      el("p", {}), beside);
    return { element, keys, enter: () => { if (state.shown) remember(`latent/${m}`, { examples: state.shown }); } };
  };

  // Two latents, of one SAE or of two (`other`).
  clipsae.views.beside = async ([a, b], link) => {
    const mine = clipsae.here;
    const theirs = link.get("other") ? await clipsae.dictionary(link.get("other")) : mine;
    const pair = [[number(a, mine), mine], [number(b, theirs), theirs]];
    const data = await Promise.all(pair.map(([m, of]) => clipsae.latent(m, of)));
    state.shown = link.get("examples") || state.shown;
    const frames = [[], []];
    const told_ = () => remember(`beside/${a}/${b}`, { other: theirs === mine ? "" : theirs.name, examples: state.shown });
    const parts = [];
    const sides = pair.map(([m, of], i) => {
      const title = el("h1", {}, el("a", { href: to(`latent/${m}`, {}, of) }, clipsae.meta.saes.length > 1 ? `${of.name} ${m}` : `Latent ${m}`));
      if (!data[i]) return el("section", { class: "side" }, title, el("p", {}, "Dead: no token of these images makes it active."));
      const place = el("div", {});
      parts.push(() => { const [which, shown] = pictures(data[i], frames[i], () => { parts.forEach((part) => part()); told_(); }); place.replaceChildren(which, el("p", { style: "margin:0;height:8px" }), shown); });
      parts.at(-1)();
      return el("section", { class: "side" }, title, el("p", { class: "soft", style: "margin:4px 0" }, meaning(m, of)), clipsae.kept.tools(m, data[i], of).element,
        factsOf(m, of), told(m, of), el("h2", {}, "Images"), place, el("h2", {}, "Codes", el("small", {}, "of all tokens, above zero")), histogram(data[i].histogram),
        ...["helps", "hurts"].filter((role) => data[i][role]).flatMap((role) => [el("h2", {}, role === "helps" ? "Helps" : "Hurts"),
          data[i][role].length ? bars(data[i][role].map(([k, v]) => [clipsae.meta.classnames[k], v, signed(v)]), Math.max(...data[i][role].map(([, v]) => Math.abs(v))), role === "helps" ? "good" : "bad") : el("p", { class: "soft" }, "none")]));
    });
    let alike = null;
    if (theirs !== mine) {
      const { latent, cosine, chance } = await clipsae.match(mine, theirs);
      const [m, k] = [pair[0][0], pair[1][0]];
      if (latent[m] === k) alike = `Cosine of the decoder rows ${digits(cosine[m], 2)}; 95 % of random directions stay below ${digits(chance, 2)}.`;
    } else if (data[0]) {
      const found = data[0].near.find(([k]) => k === pair[1][0]);
      if (found) alike = `Cosine of the decoder rows ${digits(found[1], 2)}.`;
    }
    const common = data[0] && data[1] ? data[0].images.filter((index) => data[1].images.includes(index)).length : 0;
    const heat = heatButtons(() => frames.flat());
    const element = el("div", { class: "page" }, el("div", { class: "row" }, heat, el("span", { class: "soft" }, alike, ` ${common} of their strongest images are the same.`)),
      el("div", { class: "two" }, ...sides));
    return { element, keys: (event) => { if (event.key !== "h") return false; heat.next(); return true; } };
  };
})();
