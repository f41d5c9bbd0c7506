
// --- sortable tables ---------------------------------------------------------------------------

function sortValue(row, column) {
  const text = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

// Numbers come before text, and cells without a value last.
function compare(a, b) {
  const rank = (v) => (v === "" || v === "-" ? 2 : typeof v === "number" ? 0 : 1);
  if (rank(a) !== rank(b) || rank(a) === 2) return [rank(a) - rank(b), true];
  return [typeof a === "number" ? a - b : a.localeCompare(b), false];
}

for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const down = head.getAttribute("aria-sort") === "descending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "ascending" : "descending");
    const body = head.closest("table").lastElementChild;
    body.append(...[...body.rows].sort((a, b) => {
      const [order, fixed] = compare(sortValue(a, head.cellIndex), sortValue(b, head.cellIndex));
      return fixed || down ? order : -order;
    }));
  });
}
