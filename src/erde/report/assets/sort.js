// Tables whose rows are sorted by a click on a heading, or by Enter or space on it.
(function () {
  "use strict";
  const OPPOSITE = { ascending: "descending", descending: "ascending" };
  // Numbers stand beside the cell, as they are not in words; a cell without one is told by its text.
  const numeric = (cell) => cell.dataset.value !== undefined;

  function sort(table, heading) {
    const body = table.tBodies[0], rows = [...body.rows], column = heading.cellIndex;
    const numbers = rows.some((row) => numeric(row.cells[column])), first = numbers ? "descending" : "ascending";
    const order = heading.getAttribute("aria-sort") === first ? OPPOSITE[first] : first, sign = order === "ascending" ? 1 : -1;
    const value = (row) => (numbers ? Number.parseFloat(row.cells[column].dataset.value) : row.cells[column].textContent.trim());
    const compared = (a, b) => {
      if (!numbers) return sign * value(a).localeCompare(value(b), undefined, { numeric: true });
      // What is not known stays below, whichever way.
      return Number.isNaN(value(a)) - Number.isNaN(value(b)) || sign * (value(a) - value(b));
    };
    body.append(...rows.sort(compared));
    [...heading.parentNode.cells].forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", order);
    erde.announce(`Sorted by ${heading.textContent.replace(/\s+/g, " ").trim()}, ${order}`);
  }

  document.querySelectorAll("table.sortable").forEach((table) => [...table.tHead.rows[0].cells].forEach((heading) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "sort" });
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table, heading));
  }));
})();
