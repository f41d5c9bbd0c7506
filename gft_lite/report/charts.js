// --- interactive charts ------------------------------------------------------------------------

// The drawn plots are replaced by charts; without this script they stay.
const page = JSON.parse(document.getElementById("charts").textContent);
const charts = new Map(); // By the name of the plot.
const DASHES = [[], [7, 4], [2, 3], [8, 3, 2, 3]];
const PARTS = ["low", "high", "raw", "y"]; // The series of a curve, in this order after x.
let hovered = null;
let weight = 0;

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function colorOf(curve) {
  return curve.color === null ? css("--faint") : page.palette[curve.color % page.palette.length];
}

function dashOf(curve) {
  if (curve.color === null) return DASHES[1];
  return DASHES[(curve.dash || Math.floor(curve.color / page.palette.length)) % DASHES.length];
}

// The moving average s_i = w s_(i-1) + (1 - w) y_i from s_0 = 0, divided by 1 - w^n after n values
// so that early values are not pulled to 0. Gaps stay gaps.
function smooth(values, w) {
  let sum = 0;
  let scale = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    sum = w * sum + (1 - w) * value;
    scale = w * scale + (1 - w);
    return sum / scale;
  });
}

function figureText(value, unit) {
  if (unit === "share") return `${Number((100 * value).toPrecision(3))}%`;
  if (Math.abs(value) >= 1e5) return `${Number((value / 1000).toPrecision(4))}k`;
  return String(Number(value.toPrecision(3)));
}

function curvesOf(chart) {
  return chart.second ? [...chart.curves, chart.second] : chart.curves;
}

// All curves over the same x. Where a curve has no value of its own, `undefined` lets its line go
// on; null is a gap.
function aligned(chart) {
  const xs = [...new Set(curvesOf(chart).flatMap((curve) => curve.x))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, i) => [x, i]));
  const on = (curve, values) => {
    const all = new Array(xs.length).fill(undefined);
    if (values) curve.x.forEach((x, i) => { all[place.get(x)] = values[i]; });
    return all;
  };
  const w = chart.points ? 0 : weight;
  return [xs, ...curvesOf(chart).flatMap((curve) => {
    const y = on(curve, curve.y);
    return [on(curve, curve.low), on(curve, curve.high), w ? y : on(curve, null), w ? smooth(y, w) : y];
  })];
}

function seriesOf(chart) {
  return curvesOf(chart).flatMap((curve) => PARTS.map((part) => ({
    label: curve.label,
    scale: curve === chart.second ? "second" : "y",
    stroke: () => (part === "y" ? colorOf(curve) : part === "raw" ? `${colorOf(curve)}55` : "transparent"),
    width: part === "raw" ? 1 : part === "y" ? 1.8 : 0,
    dash: part === "y" ? dashOf(curve) : [],
    points: part !== "y" ? { show: false } : chart.points ? { show: true, size: 7, fill: () => colorOf(curve) } : { fill: () => css("--paper") },
  })));
}

// Error bars of single measurements, and rings.
function drawMarks(u, chart) {
  const { ctx } = u;
  const pixels = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height); // Intervals can exceed a share's range.
  ctx.clip();
  curvesOf(chart).forEach((curve, k) => {
    if (!u.series[PARTS.length * (k + 1)].show) return;
    const scale = curve === chart.second ? "second" : "y";
    ctx.strokeStyle = colorOf(curve);
    ctx.lineWidth = 1.3 * pixels;
    ctx.beginPath();
    curve.x.forEach((value, i) => {
      const x = u.valToPos(value, "x", true);
      const [low, high] = [curve.low, curve.high].map((side) => side?.[i] ?? null);
      if (chart.points && low !== null && high !== null) {
        ctx.moveTo(x, u.valToPos(low, scale, true));
        ctx.lineTo(x, u.valToPos(high, scale, true));
      }
      if (curve.rings.includes(i) && curve.y[i] !== null) {
        const y = u.valToPos(curve.y[i], scale, true);
        ctx.moveTo(x + 7 * pixels, y);
        ctx.arc(x, y, 7 * pixels, 0, 2 * Math.PI);
      }
    });
    ctx.stroke();
  });
  ctx.restore();
}

function axesOf(chart) {
  const axis = (unit) => ({
    stroke: () => css("--faint"),
    grid: { stroke: () => css("--rule"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
    values: (u, ticks) => ticks.map((v) => (v === null ? "" : figureText(v, unit))),
  });
  const x = { ...axis("number"), grid: { show: false }, size: 26, space: 44, label: chart.x,
    labelSize: 18, labelGap: 0, labelFont: "11px system-ui, sans-serif" };
  const own = [...new Set(curvesOf(chart).flatMap((curve) => curve.x))];
  if (chart.points) Object.assign(x, { splits: () => own, filter: apart, space: 20 });
  else x.incrs = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];
  const y = { ...axis(chart.unit), scale: "y", size: 50 };
  const second = { ...axis("share"), scale: "second", side: 1, size: 46, grid: { show: false } };
  return chart.second ? [x, y, second] : [x, y];
}

// The ticks whose labels do not touch the one before, the others null.
function apart(u, ticks) {
  let end = -Infinity;
  return ticks.map((tick) => {
    const [at, half] = [u.valToPos(tick, "x"), 3.3 * figureText(tick, "number").length];
    if (at - half < end + 6) return null;
    end = at + half;
    return tick;
  });
}

function xRange(chart) {
  return (u, low, high) => {
    if (low === null) return [0, 1];
    if (chart.log) return [low / 1.15, high * 1.15];
    const space = chart.points ? 0.04 * (high - low) : 0;
    return low === high ? [low - 1, high + 1] : [low - space, high + space];
  };
}

// The dot at the pointer: of a curve, but not of its range.
function dotColor(chart) {
  return (u, i) => (i % PARTS.length ? "transparent" : colorOf(curvesOf(chart)[i / PARTS.length - 1]));
}

function optionsOf(chart, width) {
  const bands = chart.points ? [] : curvesOf(chart).flatMap((curve, k) => (curve.low
    ? [{ series: [PARTS.length * k + 2, PARTS.length * k + 1], fill: () => `${colorOf(curve)}26` }] : []));
  const steps = chart.x === "step";
  return {
    width, height: 230, padding: [8, 10, 0, 0], legend: { show: false },
    scales: {
      x: { time: false, distr: chart.log ? 3 : 1, range: xRange(chart) },
      y: { range: () => chart.range },
      ...(chart.second ? { second: { range: () => chart.second.range } } : {}),
    },
    axes: axesOf(chart),
    series: [{}, ...seriesOf(chart)],
    bands,
    cursor: {
      drag: { x: true, y: true, uni: 40, dist: 5 },
      points: { size: 8, width: 0, fill: dotColor(chart) },
      y: false,
      ...(steps ? { sync: { key: "steps", setSeries: false, scales: ["x", null] } } : {}),
    },
    hooks: {
      draw: [(u) => drawMarks(u, chart)],
      setCursor: [(u) => { if (u === hovered) showValues(u, chart); }],
    },
  };
}

// --- values under the pointer ------------------------------------------------------------------

const values = document.body.appendChild(document.createElement("div"));
values.id = "values";
values.hidden = true;
values.setAttribute("aria-live", "polite");

function showValues(u, chart) {
  const { idx, left, top } = u.cursor;
  const rows = [];
  curvesOf(chart).forEach((curve, k) => {
    const at = PARTS.length * (k + 1);
    const [low, high, raw, y] = [3, 2, 1, 0].map((back) => u.data[at - back]?.[idx] ?? null);
    if (idx === null || !u.series[at].show || y === null) return;
    const unit = curve === chart.second ? "share" : chart.unit;
    const row = document.createElement("p");
    const chip = row.appendChild(document.createElement("span"));
    chip.className = "chip";
    chip.style.background = colorOf(curve);
    const range = low === null ? "" : ` [${figureText(low, unit)}, ${figureText(high, unit)}]`;
    const before = raw === null ? "" : `, not smoothed ${figureText(raw, unit)}`;
    row.append(`${curve.label || chart.y || "value"}: ${figureText(y, unit)}${range}${before}`);
    rows.push(row);
  });
  values.hidden = !rows.length || left < 0;
  if (values.hidden) return;
  const head = document.createElement("p");
  head.append(`${chart.x} ${figureText(u.data[0][idx], "number")}`);
  values.replaceChildren(head, ...rows);
  const box = u.over.getBoundingClientRect();
  const right = box.left + left + 16;
  const fits = right + values.offsetWidth < document.documentElement.clientWidth - 4;
  const under = Math.max(4, Math.min(box.top + top + 12, innerHeight - values.offsetHeight - 4));
  values.style.left = `${fits ? right : Math.max(4, box.left + left - values.offsetWidth - 16)}px`;
  values.style.top = `${under + scrollY}px`; // Of the page, so that it moves with its chart.
}

// --- charts in place of drawings ---------------------------------------------------------------

// The runs of the series whose line is nearest to the pointer.
function runsAt(u, chart) {
  const { idx, top } = u.cursor;
  const near = chart.curves.map((curve, k) => {
    const y = u.data[PARTS.length * (k + 1)][idx];
    const shown = u.series[PARTS.length * (k + 1)].show && y !== null && y !== undefined;
    return [shown ? Math.abs(u.valToPos(y, "y") - top) : Infinity, chart.bySeries ? curve.color : 0];
  });
  const [, color] = near.reduce((a, b) => (b[0] < a[0] ? b : a));
  return page.runs[color] ?? [];
}

function opensGroups(chart) {
  return chart.x === "step" && typeof openGroups === "function";
}

function listen(u, chart) {
  let from = null;
  let tapped = null; // Where a finger shows values: a second tap opens the groups.
  let waiting; // A double click shows the whole range, and is not two single ones.
  u.over.addEventListener("pointerenter", () => { hovered = u; });
  u.over.addEventListener("pointerdown", (event) => {
    hovered = u;
    from = [event.clientX, event.clientY];
    if (event.pointerType !== "touch") tapped = null;
    else tapped ??= -1;
  });
  u.over.addEventListener("pointerleave", () => { values.hidden = true; });
  if (!opensGroups(chart)) return;
  u.over.style.cursor = "pointer";
  u.over.addEventListener("click", (event) => {
    const moved = from && Math.hypot(event.clientX - from[0], event.clientY - from[1]) > 4;
    const { idx } = u.cursor;
    if (moved || idx === null) return;
    const again = tapped === null || tapped === idx;
    if (tapped !== null) tapped = idx;
    if (!again) return;
    const [step, runs] = [u.data[0][idx], runsAt(u, chart)];
    clearTimeout(waiting);
    waiting = setTimeout(() => openGroups(step, runs), 250);
  });
  u.over.addEventListener("dblclick", () => { if (tapped === null) clearTimeout(waiting); });
}

// Left and right show the values of a step, Enter opens its groups.
function listenToKeys(u, chart, place) {
  place.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      const { min, max } = u.scales.x;
      const seen = [...u.data[0].keys()].filter((i) => u.data[0][i] >= min && u.data[0][i] <= max);
      const at = hovered === u ? seen.indexOf(u.cursor.idx) : -1;
      const to = at < 0 ? (step > 0 ? 0 : seen.length - 1) : Math.max(0, Math.min(at + step, seen.length - 1));
      hovered = u;
      u.setCursor({ left: u.valToPos(u.data[0][seen[to]], "x"), top: u.over.clientHeight / 2 });
    } else if (event.key === "Enter" && opensGroups(chart) && hovered === u && u.cursor.idx !== null) {
      openGroups(u.data[0][u.cursor.idx], runsAt(u, chart));
    } else return;
    event.preventDefault();
  });
  place.addEventListener("blur", () => { values.hidden = true; });
}

function legend(u, chart) {
  const row = document.createElement("div");
  row.className = "legend";
  curvesOf(chart).forEach((curve, k) => {
    const button = row.appendChild(document.createElement("button"));
    Object.assign(button, { type: "button", ariaPressed: "true" });
    const chip = button.appendChild(document.createElement("span"));
    chip.className = "chip";
    chip.style.background = colorOf(curve);
    button.append(curve.label);
    button.addEventListener("click", () => {
      const on = button.ariaPressed === "false";
      button.ariaPressed = String(on);
      showCurve(u, k, on);
    });
  });
  return row;
}

function showCurve(u, k, on) {
  PARTS.forEach((_, part) => u.setSeries(PARTS.length * k + part + 1, { show: on }));
}

function makeChart(figure, chart) {
  const place = figure.appendChild(document.createElement("div"));
  place.className = "chart";
  place.tabIndex = 0;
  place.setAttribute("role", "group");
  place.setAttribute("aria-label", `${figure.querySelector("figcaption")?.textContent.trim()}: left and right show values`);
  figure.classList.add("live");
  const u = new uPlot(optionsOf(chart, place.clientWidth || 360), aligned(chart), place);
  charts.set(figure.dataset.name, { u, chart });
  listen(u, chart);
  listenToKeys(u, chart, place);
  if (!chart.bySeries && curvesOf(chart).length > 1) figure.append(legend(u, chart));
  new ResizeObserver(() => {
    if (place.clientWidth) u.setSize({ width: place.clientWidth, height: 230 });
  }).observe(place);
}

document.querySelectorAll("figure.plot").forEach((figure, i) => {
  if (page.charts[i]) makeChart(figure, page.charts[i]);
});

for (const tools of document.querySelectorAll(".tools")) {
  tools.hidden = !charts.size;
  const slider = tools.querySelector("[name=smoothing]");
  slider?.addEventListener("input", () => {
    weight = Number(slider.value);
    tools.querySelector("output").textContent = weight.toFixed(2);
    for (const { u, chart } of charts.values()) if (!chart.points) u.setData(aligned(chart), false), u.redraw();
  });
  tools.querySelector("button").addEventListener("click", () => {
    for (const { u, chart } of charts.values()) u.setData(aligned(chart), true);
  });
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const { u } of charts.values()) u.redraw();
});
