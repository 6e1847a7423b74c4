// Loading data, moving between views, and what all views share.
"use strict";

const clipsae = (() => {
  const waiting = new Map();
  const loaded = new Map();

  // Each data script calls this.
  function data(name, content) {
    const found = waiting.get(name);
    if (found) found.resolve(content);
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
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i); // from() with a function is ten times slower
    const view = new DataView(bytes.buffer);
    const n = bytes.length / 4;
    const values = type === "f" ? new Float32Array(n) : new Int32Array(n);
    for (let i = 0; i < n; i++) values[i] = type === "f" ? view.getFloat32(4 * i, true) : view.getInt32(4 * i, true);
    return values;
  }

  return { data, load, column, views: {}, meta: null, columns: null };
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
const alive = (m) => clipsae.columns.tokens[m] > 0;

function labelOf(m) {
  const at = clipsae.columns.label[m];
  return at < 0 ? "" : clipsae.meta.classnames[at];
}
function conceptOf(m) {
  const at = clipsae.columns.concept[m];
  return at < 0 ? "" : clipsae.meta.concepts[at];
}
function wordOf(m) {
  const at = clipsae.columns.word[m];
  return at < 0 ? "" : clipsae.meta.words[at];
}
function helpsOf(m) {
  const at = clipsae.columns.helps[m];
  return at < 0 ? "" : clipsae.meta.classnames[at];
}
// The concepts that a latent leads: [concept, rank, precision], the largest precision first.
function leadsOf(m) {
  if (!leadsOf.of) {
    leadsOf.of = new Map();
    clipsae.meta.leading.forEach((latents, k) => latents.forEach(([of, precision], rank) => {
      if (!leadsOf.of.has(of)) leadsOf.of.set(of, []);
      leadsOf.of.get(of).push([k, rank, precision]);
    }));
    leadsOf.of.forEach((list) => list.sort((a, b) => b[2] - a[2]));
  }
  return leadsOf.of.get(m) || [];
}
// A share of a latent's activation, and what chance would give.
const against = (k, precision) => `${percent(precision)} (chance ${percent(clipsae.meta.base[k])})`;
// The concept that stands out, with its figures; where none does, that, and the label of its top
// images, which is all that is known of a latent without ground truth.
function meaning(m) {
  if (conceptOf(m)) return `${conceptOf(m)} ${against(clipsae.columns.concept[m], clipsae.columns.precision[m])}`;
  return clipsae.meta.concepts.length && alive(m) ? `none (label: ${labelOf(m)})` : labelOf(m);
}

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

// --- moving between views ---

let current = null;

async function show() {
  const parts = location.hash.replace(/^#\/?/, "").split("/");
  const name = parts[0] || "latents";
  const view = clipsae.views[name] || clipsae.views.latents;
  const main = document.getElementById("main");
  if (current && current.leave) current.leave();
  current = null;
  document.querySelectorAll("nav a").forEach((link) => {
    const of = link.getAttribute("href").slice(2) || "latents";
    const here = of === name || (of === "latents" && name === "latent") || (of === "images" && name === "image");
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
  const asked = location.hash;
  let content;
  try {
    content = await view(parts.slice(1));
  } catch (error) {
    content = { element: el("div", { class: "page" }, el("p", {}, String(error.message || error))) };
  }
  if (asked !== location.hash) return; // left in the meantime
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
  else if (event.key === "Escape") location.hash = "#/";
  else if (event.key === "m") location.hash = "#/map";
  else if (event.key === "i") location.hash = "#/images";
  else if (event.key === "?") location.hash = "#/about";
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
    ["h", "heat map, active patches, picture"], ["i", "images"], ["m", "map"], ["t", "light or dark"], ["Esc", "back to the list"]];
  const facts = Object.entries(meta.about);
  return { element: el("div", { class: "page" },
    el("h1", {}, meta.title),
    el("h2", {}, "What this is a page of"),
    el("table", { class: "table" }, ...facts.map(([name, value]) => el("tr", {}, el("td", { class: "soft" }, name), el("td", {}, String(value))))),
    el("h2", {}, "What the numbers mean"),
    ...[
      "Frequency: the share of images on which the mean of a latent's codes over all tokens is positive. Strength: the mean of those means. A latent is dead if no token of these images makes it active.",
      "Label: the most frequent label of the ten reference images. Entropy: of their labels, weighted by activation, in nats; 0 is one label alone.",
      "MonoSemanticity: how alike the images are that a latent is active on, in the eyes of a separate image encoder.",
      meta.concepts.length ? `Concept: the ground truth that the latent's activity says most about, among the values of one attribute. Of "size=large" the question is whether the latent lies on large objects rather than on small ones: the percentage is the share that lies on large ones, of its activation on what has a size at all; in brackets what chance would give, the share of all patches with a size that are large. What says most is chosen by the information in the two, D(share || chance) in bits, times the share of all its activation that lies on what has the attribute; of few observations the lower end of a confidence interval counts. Where no concept has ${meta.named} bits, none is named. Position and count are compared over images, the others over patches. Under Concepts it is the other way round: the latents that say most about each, even where another is what they say most about.` : null,
      meta.words.length ? "Words: the cosine of the latent's decoder row with a text's embedding along the direct path alone (the row, centred and weighted as the last layer norm does, times the projection), the words' mean taken away. This is a logit lens: the blocks of CLIP that follow the SAE's layer are left out, and at inner layers such words are known to mislead. A hint, not a proof." : null,
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
  clipsae.columns = Object.fromEntries(Object.entries(clipsae.meta.columns).map(([name, packed]) => [name, clipsae.column(packed)]));
  clipsae.meta.columns = null;
  addEventListener("hashchange", show);
  show();
});
