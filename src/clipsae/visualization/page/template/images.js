// The images that have a page, and the page of one: which latents fire where.
"use strict";

(() => {
  const state = { search: "", wrong: false };
  const why = { measure: "margin", rival: null }; // how a prediction's reasons are measured; null: the runner-up
  const REASONS = 16;
  const own = {}; // a picture of one's own, as the server saw it

  clipsae.views.images = (_, link) => {
    if (link.has("q") || link.has("wrong")) { state.search = link.get("q") || ""; state.wrong = link.has("wrong"); }
    const meta = clipsae.meta;
    const search = el("input", { type: "search", placeholder: Object.keys(meta.names).length ? "Search: class, file" : "Search: class, number", "aria-label": "Search", value: state.search });
    const wrong = el("input", { type: "checkbox", checked: state.wrong });
    const grid = el("div", { class: "pictures" });
    const count = el("span", { class: "soft", role: "status" });
    const right = (look) => look.said === null || look.said === look.label;
    function renew() {
      state.search = search.value;
      state.wrong = wrong.checked;
      const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
      const found = meta.looks.filter((look) => {
        const text = `${nameOf(look.index)} ${meta.classnames[look.label]}`.toLowerCase();
        return words.every((word) => text.includes(word)) && !(state.wrong && right(look));
      });
      count.textContent = `${found.length} of ${meta.looks.length}`;
      if (current && current.element === element) remember("images", { q: state.search, wrong: state.wrong });
      grid.replaceChildren(...found.map((look) => el("a", { class: "picture", href: to(`image/${look.index}`) },
        el("div", { class: "framed" }, thumbnail(look.index)),
        el("div", { class: "caption" }, meta.classnames[look.label]), file(look.index),
        right(look) ? null : el("div", { class: "caption bad" }, `CLIP: ${meta.classnames[look.said]}`))));
    }
    search.addEventListener("input", renew);
    wrong.addEventListener("change", renew);
    const drop = clipsae.explains() ? clipsae.dropzone((look, address, name) => {
      Object.assign(own, { look, address, name, sae: clipsae.here.name });
      go(to("image/own"));
    }) : null;
    const element = el("div", {}, el("div", { class: "tools" }, search, meta.looks.some((look) => look.said !== null) ? el("label", {}, wrong, "named wrongly by CLIP") : null, count),
      el("div", { class: "page" }, drop, grid));
    renew();
    return {
      element,
      enter: renew,
      keys(event) { if (event.key !== "/") return false; search.select(); return true; },
    };
  };

  function predictions(title, list, label, kind = "") {
    const meta = clipsae.meta;
    if (!list.length) return null; // there are no texts to compare with
    return el("section", { class: kind }, el("h2", {}, title),
      bars(list.map(([k, p]) => [el("span", { class: k === label ? "good" : "" }, meta.classnames[k]), p, percent(p)]), 1));
  }

  // Where each latent is active on an image: latent -> codes of the patches.
  clipsae.where = (of) => {
    const [rows, cols] = clipsae.meta.grid;
    const first = of.tokens.length - rows * cols;
    const found = new Map();
    of.tokens.forEach(([latents, codes], token) => {
      if (token < first) return; // no patch
      latents.forEach((m, k) => {
        if (!found.has(m)) found.set(m, new Float32Array(rows * cols));
        found.get(m)[token - first] = codes[k];
      });
    });
    return found;
  };

  clipsae.views.image = async ([text], link) => {
    const meta = clipsae.meta;
    const mine = text === "own";
    const at = meta.looks.findIndex((look) => String(look.index) === text);
    if (mine ? own.sae !== clipsae.here.name : at < 0) throw new Error(mine ? "No picture has been given to this SAE: drop one under Images." : `Image ${text} has no page.`);
    const of = mine ? own.look : await clipsae.load(`${clipsae.here.at}/looks/${text}`);
    const name = mine ? own.name : nameOf(of.index);
    const label = mine ? "Your picture" : meta.classnames[of.label];
    why.measure = link.get("by") || why.measure;
    why.rival = link.get("over") === null ? why.rival : Number(link.get("over"));
    const [rows, cols] = meta.grid;
    const patches = rows * cols;
    const first = of.tokens.length - patches;
    const where = clipsae.where(of);
    const levels = (m) => {
      const codes = where.get(m);
      if (!codes) return null;
      const most = Math.max(...codes);
      return Array.from(codes, (code) => code / most);
    };
    const steer = clipsae.live() && !mine ? clipsae.steering(of.index, of.clip, link.get("set"), () => { mark(); linked(); }) : null;
    // What is chosen: the latent or patch that is pinned, the measure, and the latents that are set.
    function linked() {
      if (!current || current.element !== element) return;
      remember(`image/${text}`, { latent: pinned?.latent, patch: pinned?.patch, show: order === start ? "" : order,
        ...(reasons ? { by: why.measure === "margin" ? "" : why.measure, over: why.measure === "margin" && why.rival !== null ? why.rival : "" } : {}), set: steer?.asLink() });
    }
    const mark = () => list.querySelectorAll("button.off").forEach((b) => b.setAttribute("aria-pressed", String(steer.off(Number(b.dataset.of)))));
    const canvas = el("canvas");
    const image = meta.thumbnails || mine ? el("img", { src: mine ? own.address : `images/${of.index}.jpg`, alt: `${name}: ${label}` }) : null;
    const frame = el("div", { class: "framed", tabindex: 0, role: "img", "aria-label": "Patches: hover or use the arrow keys" }, image, canvas);
    const said = el("p", { class: "soft", role: "status" });
    const list = el("tbody");
    let pinned = null; // {patch} or {latent}: stays when the pointer leaves
    frame.repaint = () => light(pinned);

    function light(what) {
      if (what && what.patch != null) {
        const marks = new Array(patches).fill(0);
        marks[what.patch] = 1;
        const mode = HEAT.mode;
        if (mode === "plain") HEAT.mode = "heat";
        paint(canvas, marks);
        HEAT.mode = mode;
      } else paint(canvas, what && what.latent != null ? levels(what.latent) : null);
      list.querySelectorAll("tr").forEach((row) => row.classList.toggle("at", Boolean(what) && Number(row.dataset.latent) === what.latent));
    }
    function ofPatch(patch) {
      const [latents, codes] = of.tokens[patch + first];
      return latents.map((m, k) => [m, codes[k], place.get(m) ?? null]);
    }
    const reasons = of.why && of.why.latents.length ? of.why : null;
    const place = new Map((reasons ? reasons.latents : []).map((m, i) => [m, i]));
    const rival = () => { const at = reasons.classes.indexOf(why.rival); return at > 0 ? at : 1; };
    const measure = () => (why.measure === "margin" && reasons.classes.length < 2 ? "logit" : why.measure);
    // What CLIP said of its class with the latent less what it says without it.
    function effect(i) {
      const [own, without] = [reasons.logits, reasons.without[i]];
      if (measure() === "logit") return own[0] - without[0];
      if (measure() === "margin") return own[0] - own[rival()] - (without[0] - without[rival()]);
      return 100 * (Math.exp(own[0] - reasons.normaliser) - Math.exp(without[0] - reasons.normalisers[i]));
    }
    const rests = () => reasons.latents.map((m, i) => [m, reasons.means[i], i])
      .sort((a, b) => Math.abs(effect(b[2])) - Math.abs(effect(a[2])) || a[0] - b[0]).slice(0, REASONS);
    const strongest = of.latents.map((m, k) => [m, of.means[k], place.get(m) ?? null]);
    const start = reasons ? "why" : "strongest";
    let order = link.get("show") === "strongest" ? "strongest" : start;
    const ofImage = () => (order === "why" ? rests() : strongest);
    const column = el("th", {});
    const measures = [["margin", "margin over"], ["logit", "logit"], ["probability", "probability"]];
    const over = reasons ? el("select", { "aria-label": "Compared with", onchange: () => { why.rival = Number(over.value); tell(pinned); linked(); } },
      ...reasons.classes.slice(1).map((k, i) => el("option", { value: k, selected: i + 1 === rival() }, meta.classnames[k]))) : null;
    const by = reasons ? el("select", { "aria-label": "Measured by", onchange: () => { why.measure = by.value; tell(pinned); linked(); } },
      ...measures.slice(reasons.classes.length < 2 ? 1 : 0).map(([name, text]) => el("option", { value: name, selected: name === measure() }, text))) : null;
    const measured = reasons ? el("div", { class: "row measure" }, el("span", { class: "soft" }, "measured by"), by, over) : null;
    function explain() {
      const [predicted, other] = [reasons.classes[0], reasons.classes[rival()]].map((k) => meta.classnames[k]);
      if (measure() === "logit") return `How much higher CLIP's logit of "${predicted}" is with each latent than without it.`;
      if (measure() === "margin") return `How much larger the margin of "${predicted}" over "${other}" (its logit less that one's, ${signed(reasons.logits[0] - reasons.logits[rival()])}) is with each latent than without it.`;
      return `By how many percentage points the probability of "${predicted}" (${percent(Math.exp(reasons.logits[0] - reasons.normaliser))}) is higher with each latent than without it.`;
    }
    const orders = [["why", "Why this class"], ["strongest", "Strongest"]].filter(([name]) => name !== "why" || reasons).map(([name, text]) => el("button", {
      type: "button", "data-order": name, onclick: () => { order = name; pinned = null; tell(null); light(null); linked(); },
    }, text));
    function tell(what) {
      const patch = what && what.patch != null ? what.patch : null;
      const entries = patch === null ? ofImage() : ofPatch(patch);
      orders.forEach((b) => b.setAttribute("aria-pressed", String(patch === null && b.dataset.order === order)));
      const hint = matchMedia("(hover: none)").matches ? "Tap a patch to see its latents, a latent to see its patches."
        : "Hover a patch to see its latents, a latent to see its patches; click to keep.";
      said.textContent = patch === null
        ? (order === "why" ? `${explain()} ${hint}` : `Largest mean code over all tokens. ${hint}`)
        : `Patch in row ${Math.floor(patch / cols) + 1}, column ${patch % cols + 1}: ${entries.length} strongest latents.`;
      if (reasons) {
        over.hidden = measure() !== "margin";
        column.textContent = { logit: "Logit", margin: "Margin", probability: "Points" }[measure()];
        column.title = explain();
      }
      list.replaceChildren(...entries.map(([m, value, off]) => el("tr", {
        "data-latent": m, onmouseenter: () => light({ latent: m }),
        onmouseleave: () => light(pinned),
        onclick: (event) => { if (event.target.tagName !== "A") pin({ latent: m }); },
      },
      el("td", {}, thumbnail(clipsae.here.columns.image[m])),
      el("td", {}, el("a", { href: to(`latent/${m}`) }, String(m))),
      el("td", {}, meaning(m)),
      el("td", { class: "number code" }, digits(value)),
      el("td", { class: `number ${off === null ? "" : effect(off) > 0 ? "good" : "bad"}` }, off === null ? "" : signed(effect(off))),
      el("td", { class: "bad" }, off !== null && reasons.instead[off] !== reasons.classes[0] ? `→ ${meta.classnames[reasons.instead[off]]}` : ""),
      steer ? el("td", {}, el("button", { type: "button", class: "off", "data-of": m, "aria-label": `Switch latent ${m} off`, onclick: (event) => { event.stopPropagation(); steer.toggle(m); } }, "off")) : null)));
      if (steer) mark();
    }
    function pin(what) {
      const same = pinned && what && pinned.patch === what.patch && pinned.latent === what.latent;
      pinned = same ? null : what;
      if (!what || what.latent == null || same) tell(pinned);
      light(pinned);
      linked();
    }
    const patchAt = (event) => {
      const box = frame.getBoundingClientRect();
      const col = Math.floor((event.clientX - box.left) / box.width * cols);
      const row = Math.floor((event.clientY - box.top) / box.height * rows);
      return Math.max(0, Math.min(rows - 1, row)) * cols + Math.max(0, Math.min(cols - 1, col));
    };
    let last = null;
    frame.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch" || pinned) return;
      const patch = patchAt(event);
      if (patch === last) return;
      last = patch;
      tell({ patch });
      light({ patch });
    });
    frame.addEventListener("pointerleave", () => { last = null; if (!pinned) { tell(null); light(null); } });
    frame.addEventListener("click", (event) => pin({ patch: patchAt(event) }));
    const next = (by) => { const other = meta.looks[at + by]; if (other && !mine) go(to(`image/${other.index}`)); };
    const heat = heatButtons(() => [frame]);
    const head = el("div", { class: "row" }, el("h1", {}, label), el("span", { class: "soft file-name" }, name),
      meta.saes.length > 1 && !mine ? el("a", { href: to(`compare/${of.index}`) }, "both SAEs") : null, mine ? null : steps("image", next));
    const table = el("table", { class: "table" },
      el("thead", {}, el("tr", {}, el("th", {}), el("th", {}, "Latent"), el("th", {}, "Meaning"), el("th", { class: "code" }, "Code"),
        ...(reasons ? [column, el("th", {}, "Without it")] : []))), list);
    if (link.has("latent")) pinned = { latent: Number(link.get("latent")) };
    else if (link.has("patch")) pinned = { patch: Math.max(0, Math.min(patches - 1, Number(link.get("patch")) || 0)) };
    tell(pinned);
    light(pinned);
    const element = el("div", { class: "page" }, head,
      el("div", { class: "look", style: "margin-top:12px" },
        el("div", { class: "left" }, frame, el("p", { style: "margin:8px 0" }), heat,
          predictions("CLIP says", of.clip, mine ? null : of.label), steer ? steer.element : null, predictions("CLIP on the SAE's reconstruction says", of.sae, mine ? null : of.label, "later")),
        el("div", {}, el("div", { class: "row", role: "group", "aria-label": "Which latents" }, ...orders), measured, said, table)));
    return {
      element,
      theme: () => light(pinned),
      enter() { if (steer) steer.start(); },
      keys(event) {
        if (event.target === frame && event.key.startsWith("Arrow")) {
          const from = pinned && pinned.patch != null ? pinned.patch : 0;
          const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -cols, ArrowDown: cols }[event.key];
          const target = pinned && pinned.patch != null ? from + by : 0;
          if (target >= 0 && target < patches) { pinned = { patch: target }; tell(pinned); light(pinned); }
        } else if (event.key === "ArrowLeft") next(-1);
        else if (event.key === "ArrowRight") next(1);
        else if (event.key === "h") heat.next();
        else return false;
        return true;
      },
    };
  };
})();
