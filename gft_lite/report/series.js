"use strict";

// --- series on and off -------------------------------------------------------------------------

for (const box of document.querySelectorAll("[data-series]")) {
  box.addEventListener("change", () => {
    for (const curve of document.querySelectorAll(`.by-series .curve-${box.dataset.series}`)) {
      curve.style.display = box.checked ? "" : "none";
    }
  });
}
