// Notes and the shortlist: kept in this browser, and in a file.
"use strict";

(() => {
  const FORMAT = "clipsae.shortlist";
  // Pages of other SAEs keep their own.
  const key = () => `${FORMAT} ${clipsae.meta.saes.map((sae) => sae.about["In the store"] || sae.name).join(" ")}`;
  let entries = null; // "sae/latent" -> { sae, latent, note, marked }

  function all() {
    if (!entries) {
      entries = new Map();
      try { take(JSON.parse(localStorage.getItem(key()) || "[]")); } catch { /* a page from disk may have no storage */ }
    }
    return entries;
  }
  function take(list) {
    for (const { sae, latent, note, marked } of list) {
      if (!clipsae.meta.saes.some((one) => one.name === sae) || !Number.isInteger(latent)) continue;
      entries.set(`${sae}/${latent}`, { sae, latent, note: String(note || ""), marked: Boolean(marked) });
    }
  }
  function keep() {
    try { localStorage.setItem(key(), JSON.stringify([...all().values()])); } catch { /* kept until the page is closed */ }
  }
  function get(m, of = clipsae.here) {
    return all().get(`${of.name}/${m}`) || { sae: of.name, latent: m, note: "", marked: false };
  }
  function set(m, change, of = clipsae.here) {
    const entry = { ...get(m, of), ...change };
    if (entry.note || entry.marked) all().set(`${of.name}/${m}`, entry);
    else all().delete(`${of.name}/${m}`);
    of.searched = null; // notes are searched, too
    keep();
  }

  function download(name, text, type) {
    const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // A latent as a text to keep: what is known of it, where its pictures lie, the note.
  function card(m, data, of = clipsae.here) {
    const c = of.columns;
    const { note } = get(m, of);
    const interval = `${digits(c.score?.[m], 2)} (95 %: ${digits(c.low?.[m], 2)} to ${digits(c.high?.[m], 2)}; names of others ${digits(c.control?.[m], 2)})`;
    const lines = [`# ${of.name}, latent ${m}: ${brief(m, of)}`, "", `${clipsae.meta.title}. ${location.href.split("#")[0]}${to(`latent/${m}`, {}, of)}`, "",
      of.naming ? `- Name: ${trusted(m, of) ? calledOf(m, of) : "none that can be trusted"}; best word "${calledOf(m, of)}", score ${interval}` : null,
      clipsae.meta.concepts.length ? `- Concept: ${conceptOf(m, of) ? `${conceptOf(m, of)} ${against(c.concept[m], c.precision[m])}` : "none stands out"}` : null,
      `- Active on ${percent(c.frequency[m])} of the images, ${percent(c.tokens[m])} of the tokens; strength ${digits(c.strength[m])}`,
      `- Label: ${labelOf(m, of)}, entropy ${digits(c.entropy[m], 2)}; MonoSemanticity ${digits(c.monosemanticity[m], 2)}`,
      ...["helps", "hurts"].filter((role) => data[role]?.length).map((role) => `- ${role[0].toUpperCase()}${role.slice(1)}: ${data[role].map(([k, v]) => `${clipsae.meta.classnames[k]} ${signed(v)}`).join(", ")}`),
      note ? `- Note: ${note}` : null,
      ...[["Strongest images", data], ["Across its range", data.range]].flatMap(([title, images]) => ["", `## ${title}`, "",
        ...images.images.map((index, k) => `- ${nameOf(index)}, ${clipsae.meta.classnames[images.labels[k]]}: ${digits(images.values[k])}${clipsae.meta.thumbnails ? ` ![](thumbs/${Math.floor(index / 1000)}/${index}.jpg)` : ""}`)])];
    return `${lines.filter((line) => line !== null).join("\n")}\n`;
  }

  // The star and the note of a latent.
  function tools(m, data, of = clipsae.here) {
    const star = el("button", { type: "button", class: "star", "aria-pressed": String(get(m, of).marked), onclick: () => mark() }, "★ shortlist");
    const note = el("input", { type: "text", value: get(m, of).note, placeholder: "a note of your own", "aria-label": `Note on latent ${m}`, class: "note",
      oninput: () => set(m, { note: note.value.trim() }, of) });
    const save = el("button", { type: "button", class: "card", onclick: () => download(`${of.name}-${m}.md`, card(m, data, of), "text/markdown") }, "card ↓");
    function mark() {
      set(m, { marked: !get(m, of).marked }, of);
      star.setAttribute("aria-pressed", String(get(m, of).marked));
    }
    return { element: el("div", { class: "row kept" }, star, note, data ? save : null), mark };
  }

  clipsae.views.kept = async () => {
    const dictionaries = new Map();
    for (const sae of clipsae.meta.saes) dictionaries.set(sae.name, await clipsae.dictionary(sae.name));
    const list = el("div", {});
    const said = el("span", { class: "soft", role: "status" });
    const file = el("input", { type: "file", accept: ".json,application/json", hidden: true, "aria-label": "Shortlist file", onchange: () => read(file.files[0]) });
    function renew() {
      const found = [...all().values()].filter((entry) => entry.latent < dictionaries.get(entry.sae).latents)
        .sort((a, b) => b.marked - a.marked || a.sae.localeCompare(b.sae) || a.latent - b.latent);
      said.textContent = `${found.filter((entry) => entry.marked).length} on the shortlist, ${found.filter((entry) => entry.note).length} with a note`;
      list.replaceChildren(...(found.length ? found.map(({ sae, latent: m, note }) => {
        const of = dictionaries.get(sae);
        return el("div", { class: "keptrow", "data-latent": m },
          el("a", { href: to(`latent/${m}`, {}, of) }, thumbnail(of.columns.image[m])),
          el("div", {}, el("a", { href: to(`latent/${m}`, {}, of) }, clipsae.meta.saes.length > 1 ? `${sae} ${m}` : String(m)), ` ${meaning(m, of)}`,
            note ? el("div", { class: "soft" }, note) : null),
          el("button", { type: "button", "aria-label": `Remove latent ${m}`, onclick: () => { set(m, { marked: false, note: "" }, of); renew(); } }, "×"));
      }) : [el("p", { class: "soft" }, "Nothing yet: press ★ on a latent's page, or the key n, or write a note there.")]));
    }
    async function read(chosen) {
      try {
        const content = JSON.parse(await chosen.text());
        if (content.format !== FORMAT || !Array.isArray(content.latents)) throw new Error("it is no shortlist of such a page");
        take(content.latents);
        keep();
        renew();
      } catch (error) { said.textContent = `${chosen.name}: ${error.message}`; }
      file.value = "";
    }
    renew();
    const content = () => JSON.stringify({ format: FORMAT, version: 1, page: clipsae.meta.title, latents: [...all().values()] }, null, 1);
    return { element: el("div", { class: "page" },
      el("div", { class: "row" }, el("h1", {}, "Shortlist"), said),
      el("p", { class: "soft" }, "Kept in this browser alone. A file takes it elsewhere: what is read from one is added."),
      el("div", { class: "row" }, el("button", { type: "button", class: "export", onclick: () => download("shortlist.json", content(), "application/json") }, "save as a file ↓"),
        el("button", { type: "button", onclick: () => file.click() }, "read a file ↑"), file), list) };
  };

  clipsae.kept = { get, set, tools, card };
})();
