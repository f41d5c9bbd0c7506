"use strict";

// --- series on and off -------------------------------------------------------------------------

for (const box of document.querySelectorAll("[data-series]")) {
  box.addEventListener("change", () => {
    for (const curve of document.querySelectorAll(`.by-series .curve-${box.dataset.series}`)) {
      curve.style.display = box.checked ? "" : "none";
    }
    for (const { u, chart } of charts.values()) {
      chart.curves.forEach((curve, k) => {
        if (chart.bySeries && String(curve.color) === box.dataset.series) showCurve(u, k, box.checked);
      });
    }
  });
}

