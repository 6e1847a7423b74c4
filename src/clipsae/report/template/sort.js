"use strict";
// Sort a table by a column: first click the better known end (numbers: largest, words: A to Z),
// second click the other way. Empty cells stay at the end, rows below their block's heading.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    head.querySelector("button").addEventListener("click", () => {
      const bodies = [...table.tBodies].map((body) => [...body.rows].filter((row) => !row.matches(".block")));
      const texts = bodies.flat().map((row) => row.cells[at].dataset.value);
      const numeric = texts.every((text) => text === "" || Number.isFinite(Number(text)));
      const before = head.getAttribute("aria-sort");
      const ascending = before === "none" ? !numeric : before === "descending";
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      bodies.forEach((rows, i) => {
        const order = rows.map((row) => ({ row, text: row.cells[at].dataset.value }));
        order.sort((a, b) => {
          if (a.text === "" || b.text === "") return (a.text === "") - (b.text === "");
          return ascending ? compare(a.text, b.text) : compare(b.text, a.text);
        });
        table.tBodies[i].append(...order.map(({ row }) => row));
      });
    });
  });
}
// On a narrow screen the contents start folded.
if (window.matchMedia("(max-width: 60rem)").matches) {
  document.querySelector("nav details").open = false;
}
