// Loading data, moving between views, and what all views share.
"use strict";

const clipsae = (() => {
  const waiting = new Map();
  const loaded = new Map();

  // Each data script calls this. A text is compressed JSON.
  function data(name, content) {
    const found = waiting.get(name);
    if (found) found.resolve(typeof content === "string" ? inflate(content) : content);
  }
  function bytesOf(text) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i); // from() with a function is ten times slower
    return bytes;
  }
  async function inflate(text) {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  function load(name) {
    if (!loaded.has(name)) {
      loaded.set(name, new Promise((resolve, reject) => {
        waiting.set(name, { resolve });
        const script = document.createElement("script");
        script.src = `data/${name}.js`;
        script.onerror = () => { loaded.delete(name); reject(new Error(`${script.src} is missing`)); };
        document.head.append(script);
      }));
    }
    return loaded.get(name);
  }

  function column([type, text]) {
    const bytes = bytesOf(text);
    if (type === "b") return new Int8Array(bytes.buffer);
    const view = new DataView(bytes.buffer);
    const n = bytes.length / 4;
    const values = type === "f" ? new Float32Array(n) : new Int32Array(n);
    for (let i = 0; i < n; i++) values[i] = type === "f" ? view.getFloat32(4 * i, true) : view.getInt32(4 * i, true);
    return values;
  }

  // The dictionary of an SAE, by its name; the first where there is none of that name.
  async function dictionary(name) {
    const at = Math.max(0, clipsae.meta.saes.findIndex((sae) => sae.name === name));
    const of = await load(`${at}/dictionary`);
    if (!of.name) {
      of.texts = of.names;
      Object.assign(of, clipsae.meta.saes[at], { at });
      of.columns = Object.fromEntries(Object.entries(of.columns).map(([key, packed]) => [key, column(packed)]));
    }
    return of;
  }
  // A latent's page, its data; null for one that is dead.
  const latent = async (m, of) => (await load(`${of.at}/latents/${Math.floor(m / clipsae.meta.chunk)}`))[m % clipsae.meta.chunk];

  // `here`: the dictionary that is shown.
  return { data, load, column, dictionary, latent, views: {}, meta: null, here: null };
})();

// --- small helpers: text always as text, never as markup ---

function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") made.style.cssText = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

const percent = (x) => (x === 0 ? "0 %" : x < 0.0005 ? "< 0.1 %" : `${(100 * x).toFixed(1)} %`);
const digits = (x, n = 3) => (Number.isFinite(x) ? String(+x.toPrecision(n)) : "–");
const signed = (x) => (x > 0 ? "+" : "") + x.toFixed(2);
// Of an image: its file, where it is one.
const nameOf = (index) => clipsae.meta.names[index] || `image ${index}`;
const alive = (m, of = clipsae.here) => of.columns.tokens[m] > 0;

function labelOf(m, of = clipsae.here) {
  const at = of.columns.label[m];
  return at < 0 ? "" : clipsae.meta.classnames[at];
}
function conceptOf(m, of = clipsae.here) {
  const at = of.columns.concept[m];
  return at < 0 ? "" : clipsae.meta.concepts[at];
}
function helpsOf(m, of = clipsae.here) {
  const at = of.columns.helps[m];
  return at < 0 ? "" : clipsae.meta.classnames[at];
}
// What a latent is called, trusted or not.
function calledOf(m, of = clipsae.here) {
  const at = of.columns.name[m];
  return at < 0 ? "" : of.texts[at];
}
// Whether its name tells the images it is active on better than names of other latents do.
const trusted = (m, of = clipsae.here) => Boolean(of.naming) && of.columns.low[m] > of.naming.threshold;
// The concepts that a latent leads: [concept, rank, precision], the largest precision first.
function leadsOf(m, of = clipsae.here) {
  if (!of.leads) {
    of.leads = new Map();
    of.leading.forEach((latents, k) => latents.forEach(([leader, precision], rank) => {
      if (!of.leads.has(leader)) of.leads.set(leader, []);
      of.leads.get(leader).push([k, rank, precision]);
    }));
    of.leads.forEach((list) => list.sort((a, b) => b[2] - a[2]));
  }
  return of.leads.get(m) || [];
}
// A share of a latent's activation, and what chance would give.
const against = (k, precision) => `${percent(precision)} (chance ${percent(clipsae.meta.base[k])})`;
// The name, where it can be trusted; the concept that stands out, with its figures; the label of its
// top images, which is all that is known of other latents.
function meaning(m, of = clipsae.here) {
  const c = of.columns;
  const concept = conceptOf(m, of) ? `${conceptOf(m, of)} ${against(c.concept[m], c.precision[m])}` : "";
  if (trusted(m, of)) return [`${calledOf(m, of)} (${digits(c.score[m], 2)})`, concept].filter(Boolean).join(" · ");
  if (concept || !alive(m, of)) return concept;
  return of.naming || clipsae.meta.concepts.length ? `no name (label: ${labelOf(m, of)})` : labelOf(m, of);
}
// In one or two words.
const brief = (m, of = clipsae.here) => (trusted(m, of) ? calledOf(m, of) : conceptOf(m, of) || `label ${labelOf(m, of)}`);

function thumbnail(index, alt = "") {
  if (!clipsae.meta.thumbnails || index < 0) return el("span", { class: "none" });
  const src = `thumbs/${Math.floor(index / 1000)}/${index}.jpg`;
  return el("img", { src, alt, title: nameOf(index), loading: "lazy", decoding: "async" });
}

function file(index) {
  return el("div", { class: "caption file soft", title: nameOf(index) }, el("bdi", {}, nameOf(index)));
}

// A picture with the patches of a latent on it. Levels: 0..1 of each patch.
const HEAT = { mode: "heat" };
function paint(canvas, levels) {
  const [rows, cols] = clipsae.meta.grid;
  canvas.width = cols;
  canvas.height = rows;
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, cols, rows);
  if (!levels || HEAT.mode === "plain") return;
  const hot = getComputedStyle(document.documentElement).getPropertyValue("--hot");
  for (let p = 0; p < rows * cols; p++) {
    const level = levels[p];
    if (HEAT.mode === "dark" || !clipsae.meta.thumbnails && HEAT.mode !== "heat") {
      pen.fillStyle = level > 0 ? "rgba(0,0,0,0)" : "rgba(0,0,0,0.88)";
    } else {
      pen.fillStyle = level > 0 ? `rgba(${hot}, ${0.15 + 0.65 * level})` : "rgba(0,0,0,0)";
    }
    pen.fillRect(p % cols, Math.floor(p / cols), 1, 1);
  }
}
function unpack(text) {
  return Array.from(text, (c) => clipsae.meta.alphabet.indexOf(c) / (clipsae.meta.alphabet.length - 1));
}
// Example images of a latent: those with a page are links.
function examples(of, frames) {
  const pages = new Set(clipsae.meta.looks.map((look) => look.index));
  return el("div", { class: "pictures" }, ...of.images.map((index, k) => {
    const label = clipsae.meta.classnames[of.labels[k]];
    const frame = framed(index, unpack(of.maps[k]), `${nameOf(index)}: ${label}`);
    frames.push(frame);
    const said = [el("div", { class: "caption", title: label }, label), file(index),
      el("div", { class: "caption soft" }, `${digits(of.values[k])}${of.scales[k] > 0 ? "" : ", class token only"}`)];
    return pages.has(index) ? el("a", { class: "picture", href: to(`image/${index}`) }, frame, ...said) : el("div", { class: "picture" }, frame, ...said);
  }));
}
function framed(index, levels, alt) {
  const canvas = el("canvas");
  paint(canvas, levels);
  const frame = el("div", { class: "framed" }, clipsae.meta.thumbnails ? thumbnail(index, alt) : null, canvas);
  frame.repaint = () => paint(canvas, levels);
  return frame;
}
function heatButtons(frames) {
  const modes = [["heat", "Heat map"], ["dark", "Active patches"], ["plain", "Picture"]];
  const buttons = modes.map(([mode, said]) => el("button", {
    type: "button", "aria-pressed": String(HEAT.mode === mode), "data-mode": mode,
    onclick: () => choose(mode),
  }, said));
  function choose(mode) {
    HEAT.mode = mode;
    buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.mode === mode)));
    frames().forEach((frame) => frame.repaint());
  }
  const row = el("div", { class: "row", role: "group", "aria-label": "How active patches are shown" }, ...buttons);
  row.next = () => choose(modes[(modes.findIndex(([m]) => m === HEAT.mode) + 1) % modes.length][0]);
  return row;
}

function steps(of, go) {
  return el("span", { class: "steps" },
    el("button", { type: "button", onclick: () => go(-1), "aria-label": `Previous ${of}` }, "←"),
    el("button", { type: "button", onclick: () => go(1), "aria-label": `Next ${of}` }, "→"));
}

function bars(entries, largest, kind = "") {
  return el("ul", { class: "bars" }, ...entries.map(([name, value, said]) => el("li", {},
    el("span", { class: "name", title: typeof name === "string" ? name : null }, name),
    el("span", { class: "track" }, el("i", { class: kind, style: `width:${Math.max(0, Math.min(100, 100 * Math.abs(value) / (largest || 1)))}%` })),
    el("span", { class: "number" }, said))));
}

// --- moving between views: a hash is a view, and what is chosen in it ---

let current = null;

// The link of a view of an SAE. What is undefined, null, "" or false is left out.
function to(path, chosen = {}, of = clipsae.here) {
  const query = new URLSearchParams();
  if (of && of.at > 0) query.set("sae", of.name);
  for (const [key, value] of Object.entries(chosen)) if (value != null && value !== "" && value !== false) query.set(key, value === true ? "yes" : value);
  return `#/${path}${query.size ? `?${query}` : ""}`;
}
function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  return [path.split("/"), new URLSearchParams(query)];
}
// What is chosen in the view that is shown becomes its link.
function remember(path, chosen) {
  const link = to(path, chosen);
  if (link !== location.hash) history.replaceState(null, "", link);
}
const go = (link) => { location.hash = link; };

async function show() {
  const [parts, chosen] = place();
  const name = parts[0] || "latents";
  const view = clipsae.views[name] || clipsae.views.latents;
  const main = document.getElementById("main");
  if (current && current.leave) current.leave();
  current = null;
  const asked = location.hash;
  let content;
  try {
    const of = await clipsae.dictionary(chosen.get("sae"));
    if (asked !== location.hash) return;
    clipsae.here = of;
    content = await view(parts.slice(1), chosen);
  } catch (error) {
    content = { element: el("div", { class: "page" }, el("p", {}, String(error.message || error))) };
  }
  if (asked !== location.hash) return; // left in the meantime
  const sae = document.getElementById("sae");
  if (sae) sae.selectedIndex = clipsae.here.at;
  document.querySelector("header .title").href = to("");
  document.querySelectorAll("nav a").forEach((link) => {
    const of = link.dataset.view;
    link.href = to(of);
    const here = of === name || (of === "" && ["latents", "latent"].includes(name)) || (of === "images" && name === "image") || (of === "compare" && name === "beside");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  main.replaceChildren(content.element);
  main.scrollTop = 0;
  current = content;
  if (content.enter) content.enter();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing && !(current && current.keysWhileTyping && current.keysWhileTyping(event))) return;
  if (current && current.keys && current.keys(event)) { event.preventDefault(); return; }
  if (typing) return;
  if (event.key === "t") theme();
  else if (event.key === "Escape") go(to(""));
  else if (event.key === "m") go(to("map"));
  else if (event.key === "i") go(to("images"));
  else if (event.key === "s") go(to("kept"));
  else if (event.key === "?") go(to("about"));
});

function theme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("clipsae-theme", root.dataset.theme); } catch { /* not kept */ }
  if (current && current.theme) current.theme();
}

clipsae.views.about = () => {
  const meta = clipsae.meta;
  const keys = [["/", "search"], ["↑ ↓ or k j", "move in the list"], ["Enter", "open"], ["← →", "previous, next"],
    ["h", "heat map, active patches, picture"], ["n", "onto the shortlist"], ["s", "shortlist"], ["i", "images"], ["m", "map"], ["t", "light or dark"], ["Esc", "back to the list"]];
  const of = clipsae.here;
  return { element: el("div", { class: "page" },
    el("h1", {}, meta.title),
    el("h2", {}, "What this is a page of"),
    ...meta.saes.flatMap((sae) => [meta.saes.length > 1 ? el("h3", {}, sae.name) : null,
      el("table", { class: "table" }, ...Object.entries(sae.about).map(([name, value]) => el("tr", {}, el("td", { class: "soft" }, name), el("td", {}, String(value)))))]).filter(Boolean),
    el("h2", {}, "What the numbers mean"),
    ...[
      "Frequency: the share of images on which the mean of a latent's codes over all tokens is positive. Strength: the mean of those means. A latent is dead if no token of these images makes it active.",
      "Label: the most frequent label of the ten reference images. Entropy: of their labels, weighted by activation, in nats; 0 is one label alone.",
      "MonoSemanticity: how alike the images are that a latent is active on, in the eyes of a separate image encoder.",
      meta.concepts.length ? `Concept: the ground truth that the latent's activity says most about, among the values of one attribute. Of "size=large" the question is whether the latent lies on large objects rather than on small ones: the percentage is the share that lies on large ones, of its activation on what has a size at all; in brackets what chance would give, the share of all patches with a size that are large. What says most is chosen by the information in the two, D(share || chance) in bits, times the share of all its activation that lies on what has the attribute; of few observations the lower end of a confidence interval counts. Where no concept has ${meta.named} bits, none is named. Position and count are compared over images, the others over patches. Under Concepts it is the other way round: the latents that say most about each, even where another is what they say most about.` : null,
      of.naming ? `Name: the word that its examples are nearest to by CLIP, of ${of.naming.words.length.toLocaleString("en")} (CLIP-Dissect)${of.naming.explained.length ? `; of ${of.naming.explained.length.toLocaleString("en")} latents what ${of.naming.source} says that they have in common` : ""}. Score: whether the name tells images that the latent is active on from those that it is not, which it was not named from (AUROC, 0.5 is chance; judged by ${of.naming.judge === "explainer" ? of.naming.source : of.naming.judge}), with its 95 % interval. A name is shown where the low end is above ${digits(of.naming.threshold, 2)}, which 95 % of the names of other latents do not reach in its place; all else has no name.` : null,
      of.naming ? "By meaning: the words of the vocabulary that are like what is typed, and the latents whose examples CLIP finds nearest to them: cosines, after the mean of all words and that of all latents are taken away." : null,
      "Reference images: those with the largest mean codes. Across its range: drawn at random from all images it is active on, strongest first: what it mostly does.",
      meta.saes.length > 1 ? "Counterpart: the latent of the other SAE whose decoder row has the largest cosine. That is one where 95 % of random directions do not come as near." : null,
      "Helps and hurts: the margin of an image's true class, its logit less that of the strongest other class, less the same margin with the latent alone taken out of the stream; the mean over a class's images that the latent is active on, among those with a page and its first reference images. Above zero the image is named more surely with the latent. What is below 0.01 is left out; the list shows the class that is helped most.",
      "Top-n: on_n is CLIP's accuracy when only the n latents are kept that rank first for a class, by how often they are active on its images (or, with evaluation.ranking=contrast, how much more often than on the mean class's); listed is the smallest n for which the latent is one of them.",
      "Why this class: each latent alone is taken out of the stream of one image, all else in it stays, and CLIP's last layers run again. Shown is what CLIP said with it less what it says without it, of the class that it predicts: its logit; its margin, the logit less that of another class, at first the runner-up; or its probability over all classes, in percentage points. Above zero (green) the latent speaks for the class, below (red) against it. A logit may rise and all others with it: whether the prediction hangs on a latent, its margin tells. Kept are the latents with the largest effects on the logit, the probability, and the margins over the five likeliest other classes.",
      "Map: the two principal components of the decoder rows, each of unit length.",
    ].filter(Boolean).map((text) => el("p", {}, text)),
    el("h2", {}, "Keys"),
    el("table", { class: "table" }, ...keys.map(([key, said]) => el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, said)))),
  ) };
};

document.addEventListener("DOMContentLoaded", async () => {
  try {
    const kept = localStorage.getItem("clipsae-theme");
    if (kept) document.documentElement.dataset.theme = kept;
  } catch { /* a page from disk may have no storage */ }
  document.getElementById("theme").addEventListener("click", theme);
  clipsae.meta = await clipsae.load("meta");
  const sae = document.getElementById("sae");
  if (sae) {
    sae.addEventListener("change", async () => {
      const [[name, ...rest]] = place();
      const of = await clipsae.dictionary(sae.value);
      go(to(["", "latents", "latent", "beside"].includes(name) ? "" : [name, ...rest].join("/"), {}, of));
    });
  }
  addEventListener("hashchange", show);
  show();
});
