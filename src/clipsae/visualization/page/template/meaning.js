// Latents by what they mean: words of the vocabulary that are like a text, and the latents near to them.
"use strict";

(() => {
  // "stripes", "striped" and "stripe" are one word; "ring" and "cross" stay as they are.
  function stem(word) {
    const cut = word.toLowerCase().replace(/(ies|es|ed|ing|(?<!s)s|e|y)$/, "");
    return cut.length < 3 ? word.toLowerCase() : cut.replace(/([bdgkmnprt])\1$/, "$1");
  }
  const parts = (text) => text.toLowerCase().split(/[^\p{L}\p{N}]+/u).filter(Boolean);

  function distance(a, b) { // of spelling: letters that are added, left out or changed
    let row = Array.from({ length: b.length + 1 }, (_, j) => j);
    for (let i = 1; i <= a.length; i++) {
      let corner = row[0];
      row[0] = i;
      for (let j = 1; j <= b.length; j++) {
        const next = Math.min(row[j] + 1, row[j - 1] + 1, corner + (a[i - 1] === b[j - 1] ? 0 : 1));
        corner = row[j];
        row[j] = next;
      }
    }
    return row[b.length];
  }

  const stems = new WeakMap(); // of the words of each vocabulary
  // The words of a vocabulary that are like a text: itself; each of its words, or others of the same stem; those that
  // begin like it; those that are spelled nearly so.
  function like(text, words) {
    const whole = text.trim().toLowerCase();
    const exact = words.flatMap((word, i) => (word.toLowerCase() === whole ? [i] : []));
    if (exact.length || !whole) return exact;
    const asked = parts(text).map(stem);
    if (!stems.has(words)) stems.set(words, words.map((word) => parts(word).map(stem)));
    const known = stems.get(words);
    const some = (test, most) => asked.flatMap((one) => known.flatMap((own, i) => (own.some((k) => test(one, k)) ? [i] : []))
      .sort((a, b) => words[a].length - words[b].length || a - b).slice(0, most));
    for (const [test, most] of [
      [(one, own) => one === own, 3],
      [(one, own) => Math.min(one.length, own.length) >= 3 && (own.startsWith(one) || one.startsWith(own)), 3],
      [(one, own) => one.length > 3 && Math.abs(one.length - own.length) < 3 && distance(one, own) <= 1 + (one.length > 6), 1],
    ]) {
      const found = some(test, most);
      if (found.length) return [...new Set(found)];
    }
    return [];
  }

  async function vectors(of) {
    const packed = await clipsae.load(`${of.at}/meaning`);
    packed.ready ||= Object.fromEntries(["words", "wordScales", "latents", "latentScales"].map((key) => [key, clipsae.column(packed[key])]));
    return { size: packed.size, ...packed.ready };
  }

  // The words that a text is taken for, and the cosine of each latent with them; null where no word is like it.
  async function search(text, of) {
    const found = like(text, of.naming.words);
    if (!found.length) return null;
    const v = await vectors(of);
    const query = new Float64Array(v.size);
    for (const i of found) for (let k = 0; k < v.size; k++) query[k] += v.wordScales[i] * v.words[i * v.size + k];
    const length = Math.hypot(...query) || 1;
    const cosine = new Float32Array(of.latents);
    for (let m = 0; m < of.latents; m++) {
      let sum = 0;
      for (let k = 0; k < v.size; k++) sum += query[k] * v.latents[m * v.size + k];
      cosine[m] = v.latentScales[m] * sum / length;
    }
    return { words: found.map((i) => of.naming.words[i]), cosine };
  }

  clipsae.meaning = { stem, like, search };
})();
