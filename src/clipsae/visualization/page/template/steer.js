// Ablate and steer on an image's page, where a server is behind the page.
"use strict";

(() => {
  clipsae.live = () => Boolean(document.documentElement.dataset.live);
  clipsae.explains = () => document.documentElement.dataset.live === "explain";

  // A panel for one image: `toggle(latent)` switches a latent off, or leaves it as it is. `chosen`, as a link has it:
  // "5:0,12:0.8", codes of latents.
  clipsae.steering = (index, before, chosen, onchange) => {
    const meta = clipsae.meta;
    const of = clipsae.here;
    const strengths = new Map((chosen || "").split(",").filter(Boolean).map((pair) => pair.split(":").map(Number)).filter(([m, s]) => m >= 0 && m < of.latents && Number.isFinite(s)));
    const list = el("ul", { class: "bars" });
    const said = el("div", { role: "status" });
    const number = el("input", { type: "number", min: 0, max: of.latents - 1, placeholder: "latent", "aria-label": "Latent to set", style: "width:104px" });
    const form = el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); if (number.value !== "") on(Number(number.value)); } },
      number, el("button", { type: "submit" }, "switch on"), el("button", { type: "button", onclick: () => { strengths.clear(); renew(); } }, "reset"));
    const element = el("section", { class: "steer" }, el("h2", {}, "Switch latents off or on", el("small", {}, "the code on every token")), form, list, said);
    let asked = 0;

    // As strong as on the image that it is most active on.
    async function on(m) {
      if (!(m >= 0 && m < of.latents)) return;
      const data = await clipsae.latent(m, of);
      strengths.set(m, data ? Math.max(...data.scales, ...data.class) : 1);
      renew();
    }
    function toggle(m) {
      if (strengths.has(m)) strengths.delete(m);
      else strengths.set(m, 0);
      renew();
    }
    async function renew() {
      list.replaceChildren(...[...strengths].map(([m, strength]) => el("li", {},
        el("span", { class: "name" }, el("a", { href: to(`latent/${m}`) }, String(m)), ` ${meaning(m)}`),
        el("input", { type: "number", step: "any", value: digits(strength), "aria-label": `Strength of latent ${m}`, style: "width:84px",
          onchange: (event) => { strengths.set(m, Number(event.target.value) || 0); renew(); } }),
        el("button", { type: "button", "aria-label": `Leave latent ${m} as it is`, onclick: () => toggle(m) }, "×"))));
      onchange(strengths);
      const mine = ++asked;
      if (!strengths.size) { said.replaceChildren(); return; }
      let answer;
      try {
        const response = await fetch("steer", { method: "POST", headers: { "Content-Type": "application/json" },
          body: JSON.stringify({ sae: of.name, image: index, strengths: Object.fromEntries(strengths) }) });
        answer = await response.json();
      } catch { answer = { error: "The server does not answer: is it still running?" }; }
      if (mine !== asked) return; // changed in the meantime
      if (answer.error) { said.replaceChildren(el("p", { class: "bad" }, answer.error)); return; }
      const was = new Map(before);
      said.replaceChildren(el("h2", {}, "Then CLIP says"), bars(answer.clip.map(([k, p]) => [
        el("span", { class: was.has(k) ? "" : "good" }, meta.classnames[k]), p, percent(p)]), 1));
    }
    const asLink = () => [...strengths].map(([m, strength]) => `${m}:${strength === 0 ? 0 : digits(strength)}`).join(",");
    return { element, toggle, off: (m) => strengths.get(m) === 0, asLink, start: renew };
  };

  // A picture of one's own: the server behind the page says what the SAE sees in it. `onseen(look, address)`.
  clipsae.dropzone = (onseen) => {
    const said = el("span", { class: "soft", role: "status" });
    const file = el("input", { type: "file", accept: "image/*", hidden: true, "aria-label": "Picture", onchange: () => send(file.files[0]) });
    const element = el("div", { class: "drop row" }, el("button", { type: "button", onclick: () => file.click() }, "a picture of yours"), file,
      el("span", { class: "soft wide" }, "or drop it here, to see what the SAE sees in it; it stays on this machine"), said);
    async function send(picture) {
      if (!picture) return;
      said.textContent = "asking …";
      let answer;
      try {
        const response = await fetch(`explain?sae=${encodeURIComponent(clipsae.here.name)}`, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: picture });
        answer = await response.json();
      } catch { answer = { error: "The server does not answer: is it still running?" }; }
      said.textContent = answer.error || "";
      if (!answer.error) onseen(answer, URL.createObjectURL(picture), picture.name);
    }
    element.addEventListener("dragover", (event) => { event.preventDefault(); element.classList.add("over"); });
    element.addEventListener("dragleave", () => element.classList.remove("over"));
    element.addEventListener("drop", (event) => { event.preventDefault(); element.classList.remove("over"); send(event.dataTransfer.files[0]); });
    return element;
  };
})();
