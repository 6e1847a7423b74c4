// All latents: search, filter, sort. Only the rows in sight are in the page.
"use strict";

(() => {
  const state = { search: "", alive: "alive", concept: "", low: "", high: "", sort: "", down: true, at: 0, top: 0 };
  const heads = [
    ["id", "Latent", "id"], [null, "", "thumb"], ["label", "Label of top images", "label"], ["concept", "Concept", "concept"],
    ["word", "Word", "word"], ["gain", "Helps", "helps"], ["frequency", "Frequency", "frequency"], ["strength", "Strength", "strength"],
    ["entropy", "Entropy", "entropy"], ["monosemanticity", "MonoSem.", "ms"],
  ];
  let shown = []; // the latents, in order
  let named = new Set(); // the concepts that are searched for by name
  let matched = false; // what fits the search best comes first, whatever is sorted by

  function texts() {
    if (!texts.of) {
      texts.of = Array.from({ length: clipsae.meta.latents }, (_, m) =>
        `${m} ${labelOf(m)} ${conceptOf(m)} ${wordOf(m)} ${helpsOf(m)} ${leadsOf(m).map(([k]) => clipsae.meta.concepts[k]).join(" ")}`.toLowerCase());
    }
    return texts.of;
  }

  // What means something comes first, where that is known.
  function start() {
    state.sort ||= clipsae.meta.concepts.length ? "concept" : measured() ? "monosemanticity" : "frequency";
  }
  const measured = () => clipsae.columns.monosemanticity.some(Number.isFinite);

  function choose() {
    const c = clipsae.columns;
    start();
    const wanted = state.search.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const low = state.low === "" ? -1 : Number(state.low) / 100;
    const high = state.high === "" ? 2 : Number(state.high) / 100;
    const of = wanted.length ? texts() : null;
    // A number alone is a latent's number.
    const number = wanted.length === 1 && /^#?\d+$/.test(wanted[0]) ? Number(wanted[0].replace("#", "")) : null;
    shown = [];
    named = new Set();
    matched = false;
    for (let m = 0; m < clipsae.meta.latents; m++) {
      if (number !== null) {
        if (String(m).startsWith(String(number))) shown.push(m);
        continue;
      }
      if (state.alive !== "all" && alive(m) !== (state.alive === "alive")) continue;
      if (c.frequency[m] < low || c.frequency[m] > high) continue;
      if (state.concept && !(conceptOf(m) === state.concept || conceptOf(m).startsWith(`${state.concept}=`))) continue;
      if (wanted.every((word) => of[m].includes(word))) shown.push(m);
    }
    if (number !== null) return;
    if (state.sort === "id") { if (state.down) shown.reverse(); return; }
    // By concept, and one is searched for by its name: its leading latents come first, then others whose best concept
    // it is, then those that help a class of that name, then labels and words that hold it.
    named = new Set(clipsae.meta.concepts.flatMap((text, k) => (wanted.some((word) => text.toLowerCase().split("=").pop() === word) ? [k] : [])));
    const leading = new Map([...named].flatMap((k) => clipsae.meta.leading[k].map(([m], place) => [m, place])));
    const first = (m) => leading.get(m) ?? (named.has(c.concept[m]) ? 100 : wanted.includes(helpsOf(m).toLowerCase()) ? 101 : 102);
    // Numbers alone are compared: 49,152 latents are in order in a tenth of a second.
    const rank = new Uint8Array(clipsae.meta.latents);
    const key = new Float64Array(clipsae.meta.latents);
    const [values, places] = column(state.sort);
    for (const m of shown) {
      if (state.sort === "concept" && wanted.length) rank[m] = first(m);
      matched ||= rank[m] > 0 && rank[m] < 102 || leading.has(m) && state.sort === "concept";
      const value = places ? places[values[m]] ?? -1 : values[m];
      key[m] = Number.isNaN(value) ? Infinity : state.down ? -value : value; // what has no value comes last
    }
    shown.sort((a, b) => rank[a] - rank[b] || (key[a] < key[b] ? -1 : key[a] > key[b] ? 1 : a - b));
  }

  // What is sorted by: a column, and where it holds names, the place of each in the alphabet.
  function column(name) {
    const c = clipsae.columns;
    const names = { label: clipsae.meta.classnames, word: clipsae.meta.words }[name];
    if (!names) return [name === "concept" ? c.certainty : c[name], null];
    const places = [];
    names.map((text, k) => [text, k]).sort((a, b) => a[0].localeCompare(b[0])).forEach(([text, k], i, all) => {
      places[k] = i && all[i - 1][0] === text ? places[all[i - 1][1]] : i; // names may be alike
    });
    return [c[name], places];
  }

  clipsae.views.latents = () => {
    const meta = clipsae.meta;
    start();
    const narrow = matchMedia("(max-width: 760px)");
    const height = () => (narrow.matches ? 64 : 48);
    const dead = clipsae.columns.tokens.reduce((n, share) => n + (share > 0 ? 0 : 1), 0);
    const attributes = [...new Set(meta.concepts.map((name) => name.split("=")[0]))];
    const search = el("input", { type: "search", placeholder: `Search: latent, label, ${meta.concepts.length ? "concept, " : ""}word, class it helps`, "aria-label": "Search", value: state.search });
    const count = el("span", { class: "soft", role: "status" });
    const best = el("span", { class: "soft best", hidden: true }, "best match first");
    const select = (name, said, options) => {
      const made = el("select", { "aria-label": said, onchange: () => { state[name] = made.value; renew(); } },
        ...options.map(([value, text]) => el("option", { value, selected: state[name] === value }, text)));
      return made;
    };
    const number = (name, said) => {
      const made = el("input", { type: "number", min: 0, max: 100, step: "any", value: state[name], "aria-label": said, placeholder: name === "low" ? "0" : "100",
        oninput: () => { state[name] = made.value; renew(); } });
      return made;
    };
    const sorter = el("select", { "aria-label": "Sort by", class: "narrow", onchange: () => sortBy(sorter.value, sorter.value !== "id") },
      ...heads.filter(([key]) => key).map(([key, said]) => el("option", { value: key, selected: state.sort === key }, `by ${said.toLowerCase()}`)));
    const tools = el("div", { class: "tools" }, search,
      select("alive", "Which latents", [["alive", "active"], ["dead", `dead (${dead.toLocaleString("en")})`], ["all", "all"]]),
      meta.concepts.length ? select("concept", "Concept", [["", "any concept"], ...attributes.flatMap((a) => [[a, `any ${a}`],
        ...meta.concepts.filter((c) => c.startsWith(`${a}=`)).map((c) => [c, `  ${c}`])])]) : null,
      el("label", { class: "wide" }, "frequency", number("low", "Lowest frequency in percent"), "to", number("high", "Highest frequency in percent"), "%"),
      sorter, count, best);
    const buttons = heads.map(([key, said, name]) => (key
      ? el("button", { type: "button", class: name, "data-key": key, onclick: () => sortBy(key) }, said) : el("span")));
    const spacer = el("div", { style: "position:relative" });
    const scroll = el("div", { class: "scroll", tabindex: 0, role: "listbox", "aria-label": "Latents" },
      el("div", { class: "grid heads" }, ...buttons), spacer);
    const element = el("div", { class: ["list", meta.concepts.length ? "" : "no-concept", meta.words.length ? "" : "no-word", clipsae.columns.helps.some((k) => k >= 0) ? "" : "no-helps", measured() ? "" : "no-ms"].join(" ") }, tools, scroll);
    let drawn = new Map();

    function sortBy(key, down) {
      state.down = down ?? (state.sort === key ? !state.down : !["id", "label", "word", "entropy"].includes(key));
      state.sort = key;
      renew();
    }
    function renew(keep = false) {
      choose();
      lay(keep);
    }
    function lay(keep) {
      if (!keep) { state.at = 0; scroll.scrollTop = 0; }
      const active = matched ? null : state.sort;
      best.hidden = !matched;
      buttons.forEach((button, i) => {
        if (!heads[i][0]) return;
        if (heads[i][0] === active) button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else button.removeAttribute("aria-sort");
        button.textContent = heads[i][1] + (heads[i][0] === active ? (state.down ? " ↓" : " ↑") : "");
      });
      sorter.value = state.sort;
      count.textContent = `${shown.length.toLocaleString("en")} of ${meta.latents.toLocaleString("en")}`;
      drawn.forEach((row) => row.remove());
      drawn = new Map();
      spacer.style.height = `${Math.max(1, shown.length) * height()}px`;
      spacer.replaceChildren(...(shown.length ? [] : [el("p", { class: "empty" }, "No latent is like this.")]));
      draw();
    }
    function draw() {
      const h = height();
      const first = Math.max(0, Math.floor(scroll.scrollTop / h) - 8);
      const last = Math.min(shown.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / h) + 8);
      for (const [i, row] of drawn) if (i < first || i >= last) { row.remove(); drawn.delete(i); }
      for (let i = first; i < last; i++) {
        if (!drawn.has(i)) { const row = item(shown[i], i, h); drawn.set(i, row); spacer.append(row); }
        drawn.get(i).classList.toggle("at", i === state.at);
      }
      state.top = scroll.scrollTop;
    }
    function item(m, i, h) {
      const c = clipsae.columns;
      const lead = leadsOf(m).find(([k]) => named.has(k));
      const [k, share] = lead ? [lead[0], lead[2]] : [c.concept[m], c.precision[m]];
      const concept = k < 0 ? "" : meta.concepts[k];
      return el("a", { class: `grid item${alive(m) ? "" : " dead"}`, href: `#/latent/${m}`, style: `top:${i * h}px`, role: "option", tabindex: -1,
        onclick: () => { state.at = i; } },
        el("span", { class: "id" }, String(m)),
        el("span", { class: "thumb" }, thumbnail(c.image[m])),
        el("span", { class: "label" }, narrow.matches ? (alive(m) ? (lead ? `${concept} ${against(k, share)}` : meaning(m)) : "dead") : labelOf(m) || "dead"),
        el("span", { class: "concept", title: concept ? `${concept}: ${against(k, share)} of its activation` : null },
          ...(concept ? [el("div", {}, concept), el("div", { class: "soft" }, `${percent(share)}, chance ${percent(meta.base[k])}`)] : [el("span", { class: "soft" }, alive(m) ? "none" : "")])),
        el("span", { class: "word" }, wordOf(m)),
        el("span", { class: "helps" }, helpsOf(m) ? `${helpsOf(m)} ${signed(c.gain[m])}` : ""),
        el("span", { class: "number bar frequency" }, percent(c.frequency[m]), el("i", { style: `width:${100 * c.frequency[m]}%` })),
        el("span", { class: "number strength" }, digits(c.strength[m])),
        el("span", { class: "number entropy" }, digits(c.entropy[m], 2)),
        el("span", { class: "number ms" }, digits(c.monosemanticity[m], 2)));
    }
    function move(by) {
      state.at = Math.max(0, Math.min(shown.length - 1, state.at + by));
      const h = height();
      const head = 36;
      if (state.at * h < scroll.scrollTop) scroll.scrollTop = state.at * h;
      else if ((state.at + 1) * h > scroll.scrollTop + scroll.clientHeight - head) scroll.scrollTop = (state.at + 1) * h - scroll.clientHeight + head;
      draw();
    }
    let timer = 0;
    search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => { state.search = search.value; renew(); }, 60);
    });
    scroll.addEventListener("scroll", draw);
    const resized = new ResizeObserver(() => lay(true));
    return {
      element,
      enter() {
        const top = state.top;
        renew(true);
        scroll.scrollTop = top;
        draw();
        resized.observe(scroll);
      },
      leave() { resized.disconnect(); },
      keysWhileTyping: (event) => event.target === search && ["ArrowDown", "ArrowUp", "Enter"].includes(event.key),
      keys(event) {
        const steps = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10 };
        if (event.key in steps) move(steps[event.key]);
        else if (event.key === "Enter" && shown.length && event.target.tagName !== "BUTTON" && event.target.tagName !== "A") location.hash = `#/latent/${shown[state.at]}`;
        else if (event.key === "/") search.select();
        else return false;
        return true;
      },
    };
  };

  // The latent beside another in the list as it was last shown.
  clipsae.beside = (m, by) => {
    if (!shown.length) choose();
    const i = shown.indexOf(m);
    const next = i < 0 ? m + by : shown[i + by];
    return next >= 0 && next < clipsae.meta.latents ? next : null;
  };
})();
