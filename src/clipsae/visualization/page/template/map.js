// All latents that are alive as points: two principal components of their decoder rows.
"use strict";

(() => {
  const state = { colour: "", zoom: 1, x: 0, y: 0 }; // x, y: what is in the middle

  function ramp(t) { // from blue over green to yellow, readable on light and dark
    t = Math.round(64 * t) / 64; // few colours are drawn faster
    const hue = 255 - 205 * t;
    return `hsl(${hue} 75% ${42 + 14 * t}%)`;
  }
  const hash = (k) => `hsl(${(k * 137.508) % 360} 62% ${46 + 12 * (k % 3 - 1)}%)`;

  function colouring(kind) {
    const c = clipsae.here.columns;
    const meta = clipsae.meta;
    if (kind === "frequency") {
      const at = (x) => Math.max(0, Math.min(1, 1 + Math.log10(Math.max(x, 1e-4)) / 4));
      return { of: (m) => ramp(at(c.frequency[m])), legend: [0.0001, 0.001, 0.01, 0.1, 1].map((x) => [ramp(at(x)), percent(x)]) };
    }
    if (["monosemanticity", "entropy", "score"].includes(kind)) {
      const known = Array.from(c[kind]).filter(Number.isFinite);
      const low = Math.min(...sample(known)), high = Math.max(...sample(known));
      const at = (x) => (x - low) / (high - low || 1);
      return { of: (m) => (Number.isFinite(c[kind][m]) ? ramp(Math.max(0, Math.min(1, at(c[kind][m])))) : "#888"),
        legend: [low, (low + high) / 2, high].map((x) => [ramp(at(x)), digits(x, 2)]) };
    }
    if (kind === "label") {
      const many = new Map();
      for (let m = 0; m < clipsae.here.latents; m++) if (alive(m)) many.set(c.label[m], (many.get(c.label[m]) || 0) + 1);
      const top = [...many.keys()].filter((k) => k >= 0).sort((a, b) => many.get(b) - many.get(a) || a - b).slice(0, 24);
      return { of: (m) => (c.label[m] < 0 ? "#888" : hash(c.label[m])), legend: top.map((k) => [hash(k), meta.classnames[k]]) };
    }
    // An attribute of the ground truth: others are grey.
    const names = meta.concepts.map((name, k) => [name, k]).filter(([name]) => name.startsWith(`${kind}=`));
    const place = new Map(names.map(([, k], i) => [k, i]));
    const named = { red: "#d8262c", orange: "#f08a1d", yellow: "#d9bf1c", green: "#22a64b", cyan: "#1fb8c4", blue: "#2b46d8", purple: "#8a35b0", pink: "#ee8fc0", white: "#b9b9b9", black: "#333" };
    const colour = (k) => named[meta.concepts[k].split("=")[1]] || `hsl(${360 * place.get(k) / names.length} 65% 50%)`;
    return { of: (m) => (place.has(c.concept[m]) ? colour(c.concept[m]) : "rgb(140 140 140 / .18)"), legend: names.map(([name, k]) => [colour(k), name.split("=")[1]]) };
  }
  const sample = (values) => (values.length > 20000 ? values.filter((_, i) => i % Math.ceil(values.length / 20000) === 0) : values);

  clipsae.views.map = (_, link) => {
    if (link.get("colour")) state.colour = link.get("colour");
    if (link.get("zoom")) for (const key of ["zoom", "x", "y"]) state[key] = Number(link.get(key)) || (key === "zoom" ? 1 : 0);
    let timer = 0;
    const meta = clipsae.meta;
    const c = clipsae.here.columns;
    const latents = [];
    for (let m = 0; m < clipsae.here.latents; m++) if (alive(m) && Number.isFinite(c.x[m])) latents.push(m);
    const attributes = [...new Set(meta.concepts.map((name) => name.split("=")[0]))];
    if (!["frequency", "label", "entropy", "monosemanticity", "score", ...attributes].includes(state.colour)) { // what most latents have
      const many = (a) => latents.filter((m) => conceptOf(m).startsWith(`${a}=`)).length;
      state.colour = attributes.length ? attributes.reduce((a, b) => (many(b) > many(a) ? b : a)) : "frequency";
    }
    const canvas = el("canvas", { role: "img", "aria-label": `Map of ${latents.length} latents; the list shows the same` });
    const tip = el("div", { class: "tip" });
    const field = el("div", { class: "field" }, canvas, tip);
    const legend = el("div", { class: "legend" });
    const select = el("select", { "aria-label": "Colour by", onchange: () => { state.colour = select.value; draw(); } },
      ...["frequency", "label", "entropy", "monosemanticity", ...(clipsae.here.naming ? ["score"] : []), ...attributes].map((name) => el("option", { value: name, selected: state.colour === name }, name)));
    const button = (text, said, act) => el("button", { type: "button", "aria-label": said, onclick: act }, text);
    const zoom = (by, px = 0, py = 0) => {
      const next = Math.max(1, Math.min(60, state.zoom * by));
      const moved = (1 / unit() / state.zoom - 1 / unit() / next); // what is at (px, py) from the middle stays there
      state.x += px * moved;
      state.y -= py * moved;
      state.zoom = next;
      if (next === 1) state.x = state.y = 0;
      draw();
    };
    const element = el("div", { class: "map" },
      el("div", { class: "tools" }, el("label", {}, "colour by", select), button("+", "Zoom in", () => zoom(1.5)), button("−", "Zoom out", () => zoom(1 / 1.5)),
        el("span", { class: "soft wide" }, "two principal components of the decoder rows; drag, scroll, click a latent")), legend, field);
    let frame = 0;
    const unit = () => Math.max(1, Math.min(canvas.clientWidth, canvas.clientHeight) / 2 - 12); // pixels, at zoom 1
    // Where a latent is: [width, height, its place], asked of the page once for all latents.
    const view = () => {
      const [w, h] = [canvas.clientWidth, canvas.clientHeight];
      const side = state.zoom * unit();
      return [w, h, (m) => [w / 2 + side * (c.x[m] - state.x), h / 2 - side * (c.y[m] - state.y)]];
    };
    let groups = []; // [colour, latents]
    let grouped = "";
    function group(colour) {
      const found = new Map();
      for (const m of latents) {
        const of = colour.of(m);
        if (!found.has(of)) found.set(of, []);
        found.get(of).push(m);
      }
      groups = [...found].sort((a, b) => b[0].startsWith("rgb") - a[0].startsWith("rgb")); // grey lies below
      grouped = state.colour;
    }
    function draw() { cancelAnimationFrame(frame); frame = requestAnimationFrame(now); }
    function now() {
      const dots = devicePixelRatio || 1;
      canvas.width = canvas.clientWidth * dots;
      canvas.height = canvas.clientHeight * dots;
      const pen = canvas.getContext("2d");
      pen.scale(dots, dots);
      const colour = colouring(state.colour);
      if (grouped !== state.colour) group(colour);
      clearTimeout(timer); // a browser takes only so many changes of a link
      timer = setTimeout(() => remember("map", { colour: state.colour, ...(state.zoom > 1 ? { zoom: digits(state.zoom), x: digits(state.x), y: digits(state.y) } : {}) }), 200);
      const [w, h, place] = view();
      const size = Math.max(1.4, Math.min(6, 110 / Math.sqrt(latents.length) * Math.sqrt(state.zoom)));
      for (const [of, members] of groups) {
        pen.fillStyle = of;
        for (const m of members) {
          const [x, y] = place(m);
          if (x < -9 || y < -9 || x > w + 9 || y > h + 9) continue;
          if (size < 2) { pen.fillRect(x - size, y - size, 2 * size, 2 * size); continue; }
          pen.beginPath();
          pen.arc(x, y, size, 0, 7);
          pen.fill();
        }
      }
      legend.replaceChildren(...colour.legend.map(([of, said]) => el("span", { style: `--of:${of}` }, said)));
    }
    function nearest(event) {
      const box = canvas.getBoundingClientRect();
      const [px, py] = [event.clientX - box.left, event.clientY - box.top];
      let best = null;
      let least = 14 * 14;
      const place = view()[2];
      for (const m of latents) {
        const [x, y] = place(m);
        const d = (x - px) ** 2 + (y - py) ** 2;
        if (d < least) { least = d; best = m; }
      }
      return [best, px, py];
    }
    function pan(dx, dy) { // pixels
      state.x -= dx / unit() / state.zoom;
      state.y += dy / unit() / state.zoom;
    }
    let drag = null;
    let moved = false;
    canvas.addEventListener("pointerdown", (event) => { drag = [event.clientX, event.clientY]; moved = false; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointerup", (event) => {
      drag = null;
      const [m] = nearest(event);
      if (!moved && m !== null) go(to(`latent/${m}`));
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag) {
        const [dx, dy] = [event.clientX - drag[0], event.clientY - drag[1]];
        if (moved || Math.abs(dx) + Math.abs(dy) > 4) { moved = true; pan(dx, dy); drag = [event.clientX, event.clientY]; draw(); }
        return;
      }
      const [m, px, py] = nearest(event);
      tip.style.display = m === null ? "none" : "block";
      if (m === null) return;
      tip.replaceChildren(c.image[m] >= 0 ? thumbnail(c.image[m]) : "", el("b", {}, `Latent ${m}`), el("div", {}, meaning(m)), el("div", { class: "soft" }, percent(c.frequency[m])));
      tip.style.left = `${Math.min(px + 14, canvas.clientWidth - 150)}px`;
      tip.style.top = `${Math.min(py + 14, canvas.clientHeight - 140)}px`;
    });
    canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      zoom(Math.exp(-event.deltaY / 400), event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
    }, { passive: false });
    const resized = new ResizeObserver(draw);
    return {
      element,
      enter() { resized.observe(canvas); },
      leave() { resized.disconnect(); cancelAnimationFrame(frame); clearTimeout(timer); },
      theme: draw,
      keys(event) {
        const steps = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
        if (event.key === "+" || event.key === "=") zoom(1.5);
        else if (event.key === "-") zoom(1 / 1.5);
        else if (event.key in steps && event.target.tagName !== "SELECT") { pan(...steps[event.key]); draw(); }
        else return false;
        return true;
      },
    };
  };
})();
