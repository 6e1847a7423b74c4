// Two SAEs side by side: what each sees in the same image, and which latents of one are in the other.
"use strict";

(() => {
  const PAGE = 100; // rows at a time

  // Each latent's counterpart in another SAE, its cosine, and what random directions reach.
  clipsae.match = async (of, other) => {
    const packed = await clipsae.load(`${of.at}/match${other.at}`);
    packed.ready ||= { latent: clipsae.column(packed.latent), cosine: clipsae.column(packed.cosine), chance: packed.chance };
    return packed.ready;
  };

  async function pairOf(link) {
    const mine = clipsae.here;
    const named = link.get("other");
    const others = clipsae.meta.saes.filter((sae) => sae.name !== mine.name);
    if (!others.length) throw new Error("This page has one SAE: there is none to compare it with.");
    return [mine, await clipsae.dictionary((others.find((sae) => sae.name === named) || others[0]).name)];
  }

  function tabs(path, mine, theirs) {
    const others = clipsae.meta.saes.filter((sae) => sae.name !== mine.name);
    const link = (of) => to(of, { other: others.length > 1 ? theirs.name : "" });
    const choose = others.length > 1 ? el("select", { "aria-label": "Compared with", onchange: () => go(to(path, { other: choose.value })) },
      ...others.map((sae) => el("option", { selected: sae.name === theirs.name }, sae.name))) : el("b", {}, theirs.name);
    return el("div", { class: "row" }, el("span", {}, el("b", {}, mine.name), " beside "), choose,
      el("button", { type: "button", class: "swap", onclick: () => go(to(path, { other: others.length > 1 ? mine.name : "" }, theirs)) }, "swap"),
      ...[["compare", "Latents"], ["compare/images", "Images"]].map(([of, said]) => el("a", { class: "tab", href: link(of), "aria-current": of === path ? "page" : null }, said)));
  }

  function latents(mine, theirs, link, { latent, cosine, chance }) {
    const shares = (m) => cosine[m] > chance && latent[m] >= 0;
    const all = [];
    for (let m = 0; m < mine.latents; m++) if (alive(m, mine)) all.push(m);
    const none = all.filter((m) => !shares(m));
    const other = theirs === mine ? "" : clipsae.meta.saes.length > 2 ? theirs.name : "";
    const state = { show: link.get("show") || "without", q: link.get("q") || "" };
    const choose = el("select", { "aria-label": "Which latents", onchange: () => { state.show = choose.value; renew(); } },
      ...[["without", `without a counterpart (${none.length.toLocaleString("en")})`], ["with", `with one (${(all.length - none.length).toLocaleString("en")})`], ["all", `all (${all.length.toLocaleString("en")})`]]
        .map(([value, text]) => el("option", { value, selected: value === state.show }, text)));
    const search = el("input", { type: "search", placeholder: "Search: meaning", "aria-label": "Search", value: state.q, oninput: () => { state.q = search.value; renew(); } });
    const count = el("span", { class: "soft", role: "status" });
    const rows = el("div", { class: "matches" });
    const more = el("button", { type: "button", onclick: () => draw() }, "more");
    let found = [];
    let drawn = 0;
    function renew() {
      const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
      found = state.show === "all" ? all : state.show === "with" ? all.filter(shares) : none;
      if (words.length) {
        found = found.filter((m) => {
          const text = `${m} ${meaning(m, mine)} ${latent[m] < 0 ? "" : meaning(latent[m], theirs)}`.toLowerCase();
          return words.every((word) => text.includes(word) || clipsae.meaning.stem(word).length > 2 && text.includes(clipsae.meaning.stem(word)));
        });
      }
      // Those without: what means something first, the least alike first. Those with one: the most alike first.
      const means = (m) => (trusted(m, mine) || conceptOf(m, mine) ? 0 : 1);
      found = [...found].sort(state.show === "without" ? (a, b) => means(a) - means(b) || cosine[a] - cosine[b] || a - b : (a, b) => cosine[b] - cosine[a] || a - b);
      count.textContent = `${found.length.toLocaleString("en")} of ${all.length.toLocaleString("en")}`;
      rows.replaceChildren();
      drawn = 0;
      draw();
      if (current && current.element.contains(rows)) remember("compare", { other, show: state.show === "without" ? "" : state.show, q: state.q });
    }
    const side = (m, of) => el("a", { class: "match", href: to(`latent/${m}`, {}, of) }, thumbnail(of.columns.image[m]),
      el("span", {}, el("b", {}, String(m)), ` ${meaning(m, of)}`, el("span", { class: "soft" }, ` on ${percent(of.columns.frequency[m])}`)));
    function draw() {
      for (const m of found.slice(drawn, drawn + PAGE)) {
        rows.append(el("div", { class: "pair", "data-latent": m }, side(m, mine),
          latent[m] < 0 ? el("span") : el("a", { class: `cosine ${shares(m) ? "" : "soft"}`, href: to(`beside/${m}/${latent[m]}`, { other: theirs.name }), title: "beside each other" }, `${digits(cosine[m], 2)} ⇄`),
          latent[m] < 0 ? el("span") : side(latent[m], theirs)));
      }
      drawn = Math.min(found.length, drawn + PAGE);
      more.hidden = drawn >= found.length;
    }
    const share = all.length ? (all.length - none.length) / all.length : 0;
    const gist = el("p", {}, `${percent(share)} of the ${all.length.toLocaleString("en")} active latents of ${mine.name} have a counterpart in ${theirs.name}: a latent whose decoder row is nearer (by cosine) than ${digits(chance, 2)}, which 95 % of random directions do not reach.`,
      el("span", { class: "soft" }, " Swap for the other way round."));
    const element = el("div", {}, gist, concepts(mine, theirs), el("div", { class: "row" }, choose, search, count), rows, more);
    return { element, renew };
  }

  // What each SAE's latents mean, where that is known: how many latents of each concept, or name.
  function concepts(mine, theirs) {
    const count = (of) => {
      const found = new Map();
      for (let m = 0; m < of.latents; m++) {
        const what = trusted(m, of) ? calledOf(m, of) : conceptOf(m, of).split("=").pop();
        if (what && alive(m, of)) found.set(what, (found.get(what) || 0) + 1);
      }
      return found;
    };
    const [a, b] = [count(mine), count(theirs)];
    const differ = [...new Set([...a.keys(), ...b.keys()])].map((what) => [what, a.get(what) || 0, b.get(what) || 0])
      .sort((x, y) => Math.abs(y[1] - y[2]) - Math.abs(x[1] - x[2]) || x[0].localeCompare(y[0])).slice(0, 12);
    if (!differ.length) return null;
    return el("section", {}, el("h2", {}, "Latents that mean", el("small", {}, "where the numbers differ most")),
      el("div", { class: "differ" }, ...differ.map(([what, x, y]) => el("div", {}, el("b", {}, what), " ",
        el("a", { href: to("latents", { q: what }, mine) }, `${mine.name} ${x}`), " · ", el("a", { href: to("latents", { q: what }, theirs) }, `${theirs.name} ${y}`)))));
  }

  async function image(index, mine, theirs) {
    const meta = clipsae.meta;
    const at = meta.looks.findIndex((look) => String(look.index) === index);
    if (at < 0) throw new Error(`Image ${index} has no page.`);
    const [forth, back] = [await clipsae.match(mine, theirs), await clipsae.match(theirs, mine)];
    const frames = [];
    const sides = await Promise.all([[mine, theirs, forth], [theirs, mine, back]].map(async ([of, other, match]) => {
      const look = await clipsae.load(`${of.at}/looks/${index}`);
      const where = clipsae.where(look);
      const shown = look.latents.slice(0, 12);
      return el("section", { class: "side" }, el("h2", {}, el("a", { href: to(`image/${index}`, {}, of) }, of.name),
        el("small", {}, look.sae.length ? `with its reconstruction CLIP says ${meta.classnames[look.sae[0][0]]} (${percent(look.sae[0][1])})` : "its strongest latents")),
      el("div", { class: "pictures small" }, ...shown.map((m) => {
        const codes = where.get(m);
        const most = codes ? Math.max(...codes) : 1;
        const frame = framed(Number(index), codes ? Array.from(codes, (code) => code / most) : null, "");
        frames.push(frame);
        const pair = match.latent[m];
        const known = pair >= 0 && match.cosine[m] > match.chance;
        return el("a", { class: "picture", href: known ? to(`beside/${m}/${pair}`, { other: other.name }, of) : to(`latent/${m}`, {}, of), "data-latent": m }, frame,
          el("div", { class: "caption" }, el("b", {}, String(m)), ` ${brief(m, of)}`),
          el("div", { class: "caption soft" }, known ? `⇄ ${pair} (${digits(match.cosine[m], 2)})` : "⇄ none"));
      })));
    }));
    const heat = heatButtons(() => frames);
    const look = meta.looks[at];
    const next = (by) => { const other = meta.looks[at + by]; if (other) go(to(`compare/${other.index}`, { other: meta.saes.length > 2 ? theirs.name : "" })); };
    const element = el("div", {}, el("div", { class: "row", style: "margin:12px 0" }, el("div", { class: "framed", style: "width:112px" }, thumbnail(Number(index), "")), el("h1", {}, meta.classnames[look.label]), el("span", { class: "soft file-name" }, nameOf(look.index)),
      look.said === null ? null : el("span", { class: look.said === look.label ? "soft" : "bad" }, `CLIP: ${meta.classnames[look.said]}`), heat, steps("image", next)),
    el("div", { class: "two" }, ...sides));
    return { element, keys: (event) => {
      if (event.key === "ArrowLeft") next(-1);
      else if (event.key === "ArrowRight") next(1);
      else if (event.key === "h") heat.next();
      else return false;
      return true;
    } };
  }

  clipsae.views.compare = async ([what], link) => {
    const [mine, theirs] = await pairOf(link);
    const path = what ? "compare/images" : "compare";
    const head = tabs(path, mine, theirs);
    if (what === "images") {
      const meta = clipsae.meta;
      const other = meta.saes.length > 2 ? theirs.name : "";
      return { element: el("div", { class: "page" }, head, el("p", { class: "soft" }, "The same image through both: choose one."),
        el("div", { class: "pictures" }, ...meta.looks.map((look) => el("a", { class: "picture", href: to(`compare/${look.index}`, { other }) },
          el("div", { class: "framed" }, thumbnail(look.index)), el("div", { class: "caption" }, meta.classnames[look.label]), file(look.index))))) };
    }
    if (what) {
      const found = await image(what, mine, theirs);
      return { element: el("div", { class: "page" }, head, found.element), keys: found.keys };
    }
    const found = latents(mine, theirs, link, await clipsae.match(mine, theirs));
    found.renew();
    return { element: el("div", { class: "page" }, head, found.element) };
  };
})();
