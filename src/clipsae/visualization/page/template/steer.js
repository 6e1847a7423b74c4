// Ablate and steer on an image's page, where a server is behind the page.
"use strict";

(() => {
  clipsae.live = () => document.documentElement.dataset.live === "yes";

  // A panel for one image; `add(latent, strength)` sets a latent, null removes it.
  clipsae.steering = (index, before, onchange) => {
    const meta = clipsae.meta;
    const strengths = new Map();
    const list = el("ul", { class: "bars" });
    const said = el("div", { role: "status" });
    const number = el("input", { type: "number", min: 0, max: meta.latents - 1, placeholder: "latent", "aria-label": "Latent to set", style: "width:104px" });
    const form = el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); if (number.value !== "") on(Number(number.value)); } },
      number, el("button", { type: "submit" }, "switch on"), el("button", { type: "button", onclick: () => { strengths.clear(); renew(); } }, "reset"));
    const element = el("section", { class: "steer" }, el("h2", {}, "Switch latents off or on", el("small", {}, "the code on every token")), form, list, said);
    let asked = 0;

    // As strong as on the image that it is most active on.
    async function on(m) {
      if (!(m >= 0 && m < meta.latents)) return;
      const of = (await clipsae.load(`latents/${Math.floor(m / meta.chunk)}`))[m % meta.chunk];
      strengths.set(m, of ? Math.max(...of.scales, ...of.class) : 1);
      renew();
    }
    function toggle(m) {
      if (strengths.has(m)) strengths.delete(m);
      else strengths.set(m, 0);
      renew();
    }
    async function renew() {
      list.replaceChildren(...[...strengths].map(([m, strength]) => el("li", {},
        el("span", { class: "name" }, el("a", { href: `#/latent/${m}` }, String(m)), ` ${meaning(m)}`),
        el("input", { type: "number", step: "any", value: digits(strength), "aria-label": `Strength of latent ${m}`, style: "width:84px",
          onchange: (event) => { strengths.set(m, Number(event.target.value) || 0); renew(); } }),
        el("button", { type: "button", "aria-label": `Leave latent ${m} as it is`, onclick: () => toggle(m) }, "×"))));
      onchange(strengths);
      const mine = ++asked;
      if (!strengths.size) { said.replaceChildren(); return; }
      let answer;
      try {
        const response = await fetch("steer", { method: "POST", headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ image: index, strengths: Object.fromEntries(strengths) }) });
        answer = await response.json();
      } catch { answer = { error: "The server does not answer: is it still running?" }; }
      if (mine !== asked) return; // changed in the meantime
      if (answer.error) { said.replaceChildren(el("p", { class: "bad" }, answer.error)); return; }
      const was = new Map(before);
      said.replaceChildren(el("h2", {}, "Then CLIP says"), bars(answer.clip.map(([k, p]) => [
        el("span", { class: was.has(k) ? "" : "good" }, meta.classnames[k]), p, percent(p)]), 1));
    }
    return { element, toggle, off: (m) => strengths.get(m) === 0 };
  };
})();
