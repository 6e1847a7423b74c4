"use strict";
// Sort a table by a column: first click the better known end (numbers: largest, words: A to Z),
// second click the other way. Empty cells stay at the end.
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    head.querySelector("button").addEventListener("click", () => {
      const rows = [...table.tBodies[0].rows];
      const texts = rows.map((row) => row.cells[at].dataset.value);
      const numeric = texts.every((text) => text === "" || Number.isFinite(Number(text)));
      const before = head.getAttribute("aria-sort");
      const ascending = before === "none" ? !numeric : before === "descending";
      const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
      const order = rows.map((row, i) => ({ row, text: texts[i] }));
      order.sort((a, b) => {
        if (a.text === "" || b.text === "") return (a.text === "") - (b.text === "");
        return ascending ? compare(a.text, b.text) : compare(b.text, a.text);
      });
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      table.tBodies[0].append(...order.map(({ row }) => row));
    });
  });
}
// On a narrow screen the contents start folded.
if (window.matchMedia("(max-width: 60rem)").matches) {
  document.querySelector("nav details").open = false;
}
