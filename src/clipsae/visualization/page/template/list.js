// All latents: search, filter, sort. Only the rows in sight are in the page.
"use strict";

(() => {
  // What is chosen, as in the view's link; "" is anything.
  const CHOSEN = { q: "", by: "", alive: "", concept: "", low: "", high: "", ms: "", score: "", named: "", kept: "", sort: "", up: "" };
  const state = { ...CHOSEN };
  let at = 0; // the row that keys move
  let top = 0; // how far the list is scrolled
  const heads = [
    ["id", "Latent", "id"], [null, "", "thumb"], ["score", "Name", "called"], ["label", "Label of top images", "label"], ["concept", "Concept", "concept"],
    ["gain", "Helps", "helps"], ["frequency", "Frequency", "frequency"], ["strength", "Strength", "strength"],
    ["entropy", "Entropy", "entropy"], ["monosemanticity", "MonoSem.", "ms"],
  ];
  const RISING = ["id", "label", "entropy"]; // the smallest comes first
  let shown = []; // the latents, in order
  let of = null; // whose they are
  let named = new Set(); // the concepts that are searched for by name
  let matched = false; // what fits the search best comes first, whatever is sorted by
  let near = null; // the search by meaning: its words, and the cosine of each latent

  function texts() {
    of.searched ||= Array.from({ length: of.latents }, (_, m) =>
      `${m} ${trusted(m, of) ? calledOf(m, of) : ""} ${labelOf(m, of)} ${conceptOf(m, of)} ${helpsOf(m, of)} ${leadsOf(m, of).map(([k]) => clipsae.meta.concepts[k]).join(" ")} ${clipsae.kept.get(m, of).note}`.toLowerCase());
    return of.searched;
  }

  // What means something comes first, where that is known.
  const first = () => (of.naming ? "score" : clipsae.meta.concepts.length ? "concept" : measured() ? "monosemanticity" : "frequency");
  const sorted = () => state.sort || first();
  const down = () => RISING.includes(sorted()) === Boolean(state.up);
  const measured = () => of.columns.monosemanticity.some(Number.isFinite);
  const { stem } = clipsae.meaning;
  const same = (a, b) => a === b || stem(a) === stem(b);

  function choose() {
    const c = of.columns;
    const wanted = state.by ? [] : state.q.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const low = state.low === "" ? -1 : Number(state.low) / 100;
    const high = state.high === "" ? 2 : Number(state.high) / 100;
    const text = wanted.length ? texts() : null;
    const stems = wanted.map(stem);
    // A number alone is a latent's number.
    const number = wanted.length === 1 && /^#?\d+$/.test(wanted[0]) ? Number(wanted[0].replace("#", "")) : null;
    shown = [];
    named = new Set();
    matched = false;
    for (let m = 0; m < of.latents; m++) {
      if (number !== null) {
        if (String(m).startsWith(String(number))) shown.push(m);
        continue;
      }
      if (state.alive !== "all" && alive(m, of) !== (state.alive !== "dead")) continue;
      if (c.frequency[m] < low || c.frequency[m] > high) continue;
      if (state.ms !== "" && !(c.monosemanticity[m] >= Number(state.ms))) continue;
      if (state.score !== "" && !(c.score[m] >= Number(state.score))) continue;
      if (state.named && !trusted(m, of)) continue;
      if (state.kept && !clipsae.kept.get(m, of).marked) continue;
      if (state.concept && !(conceptOf(m, of) === state.concept || conceptOf(m, of).startsWith(`${state.concept}=`))) continue;
      if (wanted.every((word, i) => text[m].includes(word) || stems[i].length > 2 && text[m].includes(stems[i]))) shown.push(m);
    }
    if (number !== null) return;
    if (sorted() === "id" && !near) { if (down()) shown.reverse(); return; }
    // One concept, or name, is searched for: its leading latents come first, then others whose best concept it is or
    // that are called so, then those that help a class of that name, then labels that hold it.
    const means = sorted() === "concept" || sorted() === "score";
    named = new Set(clipsae.meta.concepts.flatMap((name, k) => (wanted.some((word) => same(name.toLowerCase().split("=").pop(), word)) ? [k] : [])));
    const leading = new Map([...named].flatMap((k) => of.leading[k].map(([m], place) => [m, place])));
    const best = (m) => leading.get(m) ?? (named.has(c.concept[m]) || trusted(m, of) && wanted.some((word) => same(calledOf(m, of).toLowerCase(), word)) ? 100
      : wanted.some((word) => same(helpsOf(m, of).toLowerCase(), word)) ? 101 : 102);
    // Numbers alone are compared: 49,152 latents are in order in a tenth of a second.
    const rank = new Uint8Array(of.latents);
    const key = new Float64Array(of.latents);
    const [values, places] = near ? [near.cosine, null] : column(sorted());
    const falls = near ? true : down();
    for (const m of shown) {
      if (means && wanted.length) rank[m] = best(m);
      matched ||= means && (rank[m] > 0 && rank[m] < 102 || leading.has(m));
      const value = places ? places[values[m]] ?? -1 : values[m];
      key[m] = Number.isNaN(value) ? Infinity : falls ? -value : value; // what has no value comes last
      // Names that are not to be trusted come after those that are.
      if (!near && sorted() === "score" && !trusted(m, of) && falls) key[m] = Number.isNaN(value) ? Infinity : 1 - value;
    }
    shown.sort((a, b) => rank[a] - rank[b] || (key[a] < key[b] ? -1 : key[a] > key[b] ? 1 : a - b));
  }

  // What is sorted by: a column, and where it holds names, the place of each in the alphabet.
  function column(name) {
    const c = of.columns;
    if (name !== "label") return [name === "concept" ? c.certainty : c[name], null];
    const places = [];
    clipsae.meta.classnames.map((text, k) => [text, k]).sort((a, b) => a[0].localeCompare(b[0])).forEach(([text, k], i, all) => {
      places[k] = i && all[i - 1][0] === text ? places[all[i - 1][1]] : i; // names may be alike
    });
    return [c[name], places];
  }

  // The list as a link has it; without one, as it was last.
  function enter(link) {
    const other = of !== clipsae.here;
    of = clipsae.here;
    const given = Object.keys(CHOSEN).some((key) => link.has(key));
    const before = JSON.stringify(state);
    if (given) for (const key in CHOSEN) state[key] = link.get(key) || "";
    if (!heads.some(([key]) => key === state.sort) || !of.columns[state.sort === "concept" || state.sort === "id" ? "x" : state.sort]) state.sort = "";
    if (!of.naming) state.by = state.score = state.named = "";
    if (other || before !== JSON.stringify(state)) { at = 0; top = 0; }
    if (other) near = null;
  }

  clipsae.views.latents = async (_, link) => {
    const meta = clipsae.meta;
    enter(link);
    await think();
    const narrow = matchMedia("(max-width: 760px)");
    const height = () => (narrow.matches ? 64 : 48);
    const dead = of.columns.tokens.reduce((n, share) => n + (share > 0 ? 0 : 1), 0);
    const attributes = [...new Set(meta.concepts.map((name) => name.split("=")[0]))];
    const search = el("input", { type: "search", placeholder: `Search: ${of.naming ? "name, " : ""}${meta.concepts.length ? "concept, " : ""}label, class it helps, number`, "aria-label": "Search", value: state.q });
    const count = el("span", { class: "soft", role: "status" });
    const best = el("span", { class: "soft best", hidden: true }, "best match first");
    const select = (name, said, options) => {
      const made = el("select", { "aria-label": said, onchange: () => { state[name] = made.value; renew(); } },
        ...options.map(([value, text]) => el("option", { value, selected: state[name] === value }, text)));
      return made;
    };
    const number = (name, said, placeholder, step = "any") => {
      const made = el("input", { type: "number", min: 0, step, value: state[name], "aria-label": said, placeholder,
        oninput: () => { state[name] = made.value; renew(); } });
      return made;
    };
    const check = (name, text) => {
      const made = el("input", { type: "checkbox", checked: Boolean(state[name]), onchange: () => { state[name] = made.checked ? "yes" : ""; renew(); } });
      return el("label", {}, made, text);
    };
    const sorter = el("select", { "aria-label": "Sort by", class: "narrow", onchange: () => sortBy(sorter.value, true) },
      ...heads.filter(([key]) => key && (key !== "score" || of.naming)).map(([key, said]) => el("option", { value: key, selected: sorted() === key }, `by ${said.toLowerCase()}`)));
    const ways = of.naming ? el("span", { class: "ways", role: "group", "aria-label": "How to search" }, ...[["", "by text"], ["meaning", "by meaning"]].map(([way, said]) => el("button", {
      type: "button", "data-by": way, "aria-pressed": String(state.by === way), onclick: async () => { state.by = way; await think(); renew(); } }, said))) : null;
    const filters = el("details", { class: "filters", open: ["alive", "concept", "low", "high", "ms", "score", "kept"].some((key) => state[key]) }, el("summary", {}, "Filters"),
      el("div", { class: "tools" },
        select("alive", "Which latents", [["", "active"], ["dead", `dead (${dead.toLocaleString("en")})`], ["all", "all"]]),
        meta.concepts.length ? select("concept", "Concept", [["", "any concept"], ...attributes.flatMap((a) => [[a, `any ${a}`],
          ...meta.concepts.filter((c) => c.startsWith(`${a}=`)).map((c) => [c, `  ${c}`])])]) : null,
        el("label", {}, "frequency", number("low", "Lowest frequency in percent", "0"), "to", number("high", "Highest frequency in percent", "100"), "%"),
        measured() ? el("label", {}, "MonoSemanticity from", number("ms", "Lowest MonoSemanticity", "0", 0.05)) : null,
        of.naming ? el("label", {}, "score from", number("score", "Lowest score of the name", "0.5", 0.05)) : null,
        check("kept", "on the shortlist"),
        el("button", { type: "button", onclick: () => { Object.assign(state, CHOSEN, { q: state.q, by: state.by, sort: state.sort, up: state.up }); go(to("latents", { sort: sorted(), q: state.q, by: state.by, up: state.up })); } }, "clear")));
    const trustworthy = Array.from({ length: of.latents }, (_, m) => m).filter((m) => trusted(m)).length;
    const tools = el("div", { class: "tools" }, search, ways, of.naming ? check("named", `trusted names (${trustworthy.toLocaleString("en")})`) : null, sorter, count, best);
    const buttons = heads.map(([key, said, name]) => (key
      ? el("button", { type: "button", class: name, "data-key": key, onclick: () => sortBy(key) }, said) : el("span")));
    const spacer = el("div", { style: "position:relative" });
    const scroll = el("div", { class: "scroll", tabindex: 0, role: "listbox", "aria-label": "Latents" },
      el("div", { class: "grid heads" }, ...buttons), spacer);
    const without = [["concept", meta.concepts.length], ["called", of.naming], ["helps", of.columns.helps.some((k) => k >= 0)], ["ms", measured()]];
    const element = el("div", { class: ["list", ...without.flatMap(([name, known]) => (known ? [] : [`no-${name}`]))].join(" ") }, tools, filters, scroll);
    let drawn = new Map();

    function sortBy(key, anew = false) {
      state.up = !anew && sorted() === key && !state.up ? "yes" : "";
      state.sort = key;
      if (state.by) { state.by = ""; near = null; }
      renew();
    }
    function renew(keep = false) {
      choose();
      if (ways) ways.querySelectorAll("button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.by === state.by)));
      if (current && current.element === element) remember("latents", state);
      lay(keep);
    }
    function lay(keep) {
      if (!keep) { at = 0; scroll.scrollTop = 0; }
      const active = matched || near ? null : sorted();
      best.hidden = !matched && !state.by;
      best.textContent = near ? `nearest to ${near.words.map((word) => `“${word}”`).join(", ")}` : state.by && state.q.trim() ? "no word of the vocabulary is like it"
        : state.by ? "type what to look for" : "best match first";
      buttons.forEach((button, i) => {
        if (!heads[i][0]) return;
        if (heads[i][0] === active) button.setAttribute("aria-sort", down() ? "descending" : "ascending");
        else button.removeAttribute("aria-sort");
        button.textContent = heads[i][1] + (heads[i][0] === active ? (down() ? " ↓" : " ↑") : "");
      });
      sorter.value = sorted();
      count.textContent = `${shown.length.toLocaleString("en")} of ${of.latents.toLocaleString("en")}`;
      drawn.forEach((row) => row.remove());
      drawn = new Map();
      spacer.style.height = `${Math.max(1, shown.length) * height()}px`;
      spacer.replaceChildren(...(shown.length ? [] : [el("p", { class: "empty" }, "No latent is like this.", of.naming && !state.by && state.q ? " Try “by meaning”." : "")]));
      draw();
    }
    function draw() {
      const h = height();
      const first = Math.max(0, Math.floor(scroll.scrollTop / h) - 8);
      const last = Math.min(shown.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / h) + 8);
      for (const [i, row] of drawn) if (i < first || i >= last) { row.remove(); drawn.delete(i); }
      for (let i = first; i < last; i++) {
        if (!drawn.has(i)) { const row = item(shown[i], i, h); drawn.set(i, row); spacer.append(row); }
        drawn.get(i).classList.toggle("at", i === at);
      }
      top = scroll.scrollTop;
    }
    function item(m, i, h) {
      const c = of.columns;
      const lead = leadsOf(m).find(([k]) => named.has(k));
      const [k, share] = lead ? [lead[0], lead[2]] : [c.concept[m], c.precision[m]];
      const concept = k < 0 ? "" : meta.concepts[k];
      const told = near ? `cosine ${digits(near.cosine[m], 2)}` : of.naming && Number.isFinite(c.score[m]) ? `score ${digits(c.score[m], 2)} (${digits(c.low[m], 2)} to ${digits(c.high[m], 2)})` : "";
      const called = trusted(m) ? calledOf(m) : "no name";
      const short = !alive(m) ? "dead" : lead ? `${concept} ${against(k, share)}` : near ? `${brief(m)}, ${told}` : meaning(m);
      return el("a", { class: `grid item${alive(m) ? "" : " dead"}`, href: to(`latent/${m}`), style: `top:${i * h}px`, role: "option", tabindex: -1,
        onclick: () => { at = i; } },
        el("span", { class: "id" }, String(m), clipsae.kept.get(m).marked ? el("span", { class: "mark" }, "★") : null),
        el("span", { class: "thumb" }, thumbnail(c.image[m])),
        el("span", { class: "called", title: of.naming ? `best word: ${calledOf(m)}, ${told}` : null }, el("div", { class: trusted(m) ? "" : "soft" }, alive(m) ? called : ""), el("div", { class: "soft" }, told)),
        el("span", { class: "label" }, narrow.matches ? short : labelOf(m) || "dead"),
        el("span", { class: "concept", title: concept ? `${concept}: ${against(k, share)} of its activation` : null },
          ...(concept ? [el("div", {}, concept), el("div", { class: "soft" }, `${percent(share)}, chance ${percent(meta.base[k])}`)] : [el("span", { class: "soft" }, alive(m) ? "none" : "")])),
        el("span", { class: "helps" }, helpsOf(m) ? `${helpsOf(m)} ${signed(c.gain[m])}` : ""),
        el("span", { class: "number bar frequency" }, percent(c.frequency[m]), el("i", { style: `width:${100 * c.frequency[m]}%` })),
        el("span", { class: "number strength" }, digits(c.strength[m])),
        el("span", { class: "number entropy" }, digits(c.entropy[m], 2)),
        el("span", { class: "number ms" }, digits(c.monosemanticity[m], 2)));
    }
    function move(by) {
      at = Math.max(0, Math.min(shown.length - 1, at + by));
      const h = height();
      const head = 36;
      if (at * h < scroll.scrollTop) scroll.scrollTop = at * h;
      else if ((at + 1) * h > scroll.scrollTop + scroll.clientHeight - head) scroll.scrollTop = (at + 1) * h - scroll.clientHeight + head;
      draw();
    }
    let timer = 0;
    search.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(async () => { state.q = search.value; await think(); renew(); }, 60);
    });
    scroll.addEventListener("scroll", draw);
    const resized = new ResizeObserver(() => lay(true));
    return {
      element,
      enter() {
        const before = top;
        renew(true);
        scroll.scrollTop = before;
        draw();
        resized.observe(scroll);
      },
      leave() { resized.disconnect(); },
      keysWhileTyping: (event) => event.target === search && ["ArrowDown", "ArrowUp", "Enter"].includes(event.key),
      keys(event) {
        const steps = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10 };
        if (event.key in steps) move(steps[event.key]);
        else if (event.key === "Enter" && shown.length && event.target.tagName !== "BUTTON" && event.target.tagName !== "A") go(to(`latent/${shown[at]}`));
        else if (event.key === "/") search.select();
        else return false;
        return true;
      },
    };
  };

  // The search by meaning, where that is asked for.
  async function think() {
    const asked = state.q;
    const found = state.by && asked.trim() ? await clipsae.meaning.search(asked, of) : null;
    if (asked === state.q) near = found;
  }

  // The latent beside another in the list as it was last shown.
  clipsae.beside = (m, by) => {
    if (of !== clipsae.here) { of = clipsae.here; near = null; shown = []; }
    if (!shown.length) choose();
    const i = shown.indexOf(m);
    const next = i < 0 ? m + by : shown[i + by];
    return next >= 0 && next < of.latents ? next : null;
  };
})();
