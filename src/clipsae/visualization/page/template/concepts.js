// The concepts of the ground truth, and the latents that say most about each.
"use strict";

clipsae.views.concepts = () => {
  const meta = clipsae.meta;
  const attributes = [...new Set(meta.concepts.map((name) => name.split("=")[0]))];
  const one = ([m, precision]) => el("a", { href: to(`latent/${m}`), "data-latent": m },
    el("div", { class: "framed" }, thumbnail(clipsae.here.columns.image[m])),
    el("div", {}, `${m} `, el("span", { class: "soft" }, percent(precision))));
  const sections = attributes.map((attribute) => el("section", {}, el("h2", {}, attribute),
    el("div", { class: "concepts" }, ...meta.concepts.flatMap((name, k) => {
      const [of, value] = name.split("=");
      if (of !== attribute) return [];
      const leading = clipsae.here.leading[k].slice(0, 4);
      return [el("div", { "data-concept": name }, el("h3", {}, value, el("small", { class: "soft" }, ` chance ${percent(meta.base[k])}`)),
        leading.length ? el("div", { class: "four" }, ...leading.map(one)) : el("p", { class: "soft" }, "no latent says anything about it"))];
    }))));
  const said = "The latents whose activity says most about each concept, best first. The percentage is the share that lies there, of a latent's activation on what has the attribute at all; chance is the share that the concept has itself.";
  return { element: el("div", { class: "page" }, el("p", { class: "soft", style: "margin:0" }, said), ...sections) };
};
