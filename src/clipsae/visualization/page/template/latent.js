// The page of one latent.
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

  clipsae.views.latent = async ([text]) => {
    const m = Number(text);
    const meta = clipsae.meta;
    if (!Number.isInteger(m) || m < 0 || m >= meta.latents || text === "") {
      throw new Error(`There is no latent ${text}: expected 0 to ${meta.latents - 1}.`);
    }
    const c = clipsae.columns;
    const chunk = await clipsae.load(`latents/${Math.floor(m / meta.chunk)}`);
    const of = chunk[m % meta.chunk];
    const go = (by) => { const next = clipsae.beside(m, by); if (next !== null) location.hash = `#/latent/${next}`; };
    const head = el("div", { class: "row" },
      el("h1", {}, `Latent ${m}`),
      el("span", { class: "soft" }, meaning(m)),
      steps("latent", go));
    const keys = (event) => {
      if (event.key === "ArrowLeft" || event.key === "k") go(-1);
      else if (event.key === "ArrowRight" || event.key === "j") go(1);
      else if (event.key === "h" && heat) heat.next();
      else return false;
      return true;
    };
    let heat = null;
    if (!of) return { element: el("div", { class: "page" }, head, el("p", {}, "Dead: no token of these images makes it active.")), keys };

    const facts = el("dl", { class: "facts" }, ...[
      ["Active on images", percent(c.frequency[m])], ["on tokens", percent(c.tokens[m])], ["Strength", digits(c.strength[m])],
      ...(meta.concepts.length ? [["Concept", conceptOf(m) || "none stands out"]] : []),
      ["Label", labelOf(m)], ["Label entropy", digits(c.entropy[m], 2)], ["MonoSemanticity", digits(c.monosemanticity[m], 2)],
    ].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
    const k = c.concept[m];
    const [attribute, value] = conceptOf(m).split("=");
    const rows = ["position", "count"].includes(attribute) ? "images" : "patches";
    const explained = k < 0 ? null : el("p", { class: "soft", style: "margin:8px 0 0" },
      `${percent(c.precision[m])} of its activation on ${rows} with a ${attribute} lies on ${value}, where chance would give ${percent(meta.base[k])}: ${digits(c.precision[m] / meta.base[k], 2)} times as much. `
      + `${percent(c.covered[m])} of all its activation lies on ${rows} with a ${attribute}.`);
    const leads = leadsOf(m).map(([k, rank, precision]) => el("div", {},
      el("dt", {}, meta.concepts[k]), el("dd", {}, against(k, precision), el("span", { class: "soft" }, rank ? `, number ${rank + 1}` : ", the first"))));
    const pages = new Set(meta.looks.map((look) => look.index));
    const frames = [];
    const pictures = el("div", { class: "pictures" }, ...of.images.map((index, k) => {
      const label = meta.classnames[of.labels[k]];
      const frame = framed(index, unpack(of.maps[k]), `${nameOf(index)}: ${label}`);
      frames.push(frame);
      const spots = of.scales[k] > 0 ? "" : ", class token only";
      const said = [el("div", { class: "caption", title: label }, label), file(index),
        el("div", { class: "caption soft" }, `${digits(of.values[k])}${spots}`)];
      return pages.has(index) ? el("a", { class: "picture", href: `#/image/${index}` }, frame, ...said) : el("div", { class: "picture" }, frame, ...said);
    }));
    heat = heatButtons(() => frames);
    const effects = (of.helps || []).concat(of.hurts || []);
    const largest = Math.max(...effects.map(([, v]) => Math.abs(v)), 1e-9);
    const images = (n) => `${n} image${n === 1 ? "" : "s"}`;
    const classes = (list, kind) => (list.length
      ? bars(list.map(([k, v, n]) => [el("span", { class: "counted", title: meta.classnames[k] }, el("span", {}, meta.classnames[k]), el("span", { class: "soft" }, images(n))), v, signed(v)]), largest, kind)
      : el("p", { class: "soft" }, "none"));
    const kept = (list) => (list.length
      ? el("ul", { class: "bars" }, ...list.map(([k, n]) => el("li", {}, el("span", { class: "name", title: meta.classnames[k] }, meta.classnames[k]), el("span"), el("span", { class: "number" }, `n ≥ ${n}`))))
      : el("p", { class: "soft" }, "no class"));
    const near = el("div", { class: "near" }, ...of.near.map(([k, cosine]) => el("a", { href: `#/latent/${k}` },
      el("div", { class: "framed" }, thumbnail(c.image[k])),
      el("div", {}, `${k} `, el("span", { class: "soft" }, cosine.toFixed(2))),
      el("div", { class: "caption soft", title: meaning(k) }, meaning(k)))));
    const recipe = `${of.images.length} of ${meta.images.toLocaleString("en")} images`;
    const element = el("div", { class: "page" }, head, facts, explained,
      leads.length ? section("Leads", "the concepts that few say more about; the share of its activation, and of chance", el("dl", { class: "facts" }, ...leads)) : null,
      section("Reference images", recipe, el("div", {}, heat, el("p", { style: "margin:0;height:8px" }), pictures)),
      el("div", { class: "columns" },
        section("Codes", "of all tokens, above zero", histogram(of.histogram)),
        of.words.length ? section("Words", "its direct path points to", el("div", {},
          el("p", { class: "soft" }, "A logit lens: the blocks of CLIP that follow are left out, and at inner layers such words are known to mislead."),
          bars(of.words.map(([k, v]) => [meta.words[k], v, v.toFixed(2)]), 1))) : null,
        of.helps ? section("Helps", `with it the true class's margin is larger by this; seen on ${images(of.seen)}`, classes(of.helps, "good")) : null,
        of.hurts ? section("Hurts", "with it the true class's margin is smaller by this", classes(of.hurts, "bad")) : null,
        of.kept ? section("Top-n", "on_n keeps it for", kept(of.kept)) : null),
      of.near.length ? section("Nearest", "by the cosine of decoder rows", near) : null);
    return { element, keys };
  };
})();
