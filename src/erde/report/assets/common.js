// What erde's pages share: their data, numbers, colours, plotly's layout, figures, tables that can be copied.
const erde = (function () {
  "use strict";
  const root = document.documentElement;
  const report = JSON.parse(document.getElementById("report-data").textContent);
  // No "dot": dotted is the paper's rule.
  const DASHES = ["dash", "dashdot", "longdashdot", "longdash"];
  const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "pentagon", "hexagon", "star", "cross"];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  // Plotly reads a little HTML in every text: data must arrive escaped.
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const armColour = (index) => colour("arm-" + (index % 8));
  const percent = (share, digits) => {
    const text = (100 * share).toFixed(digits === undefined ? 1 : digits);
    return (Number(text) ? text.replace("-", "\u2212") : text.replace("-", "")) + " %";
  };
  const millions = (macs) => {
    const value = macs / 1e6;
    return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : String(Number(value.toPrecision(3)));
  };
  const images = (count) => count.toLocaleString("en") + (count === 1 ? " image" : " images");
  const interval = (measured) => percent(measured.accuracy) + " (" + percent(measured.low) + " to " + percent(measured.high) + ")";
  const errors = (list, shown) => ({
    type: "data", symmetric: false, thickness: 1, width: 3,
    array: list.map((measured) => (!shown || shown(measured) ? 100 * (measured.high - measured.accuracy) : 0)),
    arrayminus: list.map((measured) => (!shown || shown(measured) ? 100 * (measured.accuracy - measured.low) : 0)),
  });

  // The colour of an exit, between that of the first and that of the last, as in the bars.
  function exitColour(index, count) {
    const ends = [colour("exit-first"), colour("exit-last")].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
    const share = index / Math.max(count - 1, 1);
    return "rgb(" + ends[0].map((low, i) => Math.round(low + share * (ends[1][i] - low))).join(",") + ")";
  }

  // 1, 2 and 5 times the powers of ten from `low` to `high`: plotly labels only some of them in full.
  function logTicks(low, high) {
    const values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      [1, 2, 5].forEach((digit) => values.push(Number((digit * 10 ** power).toPrecision(2))));
    }
    return { type: "log", tickmode: "array", tickvals: values, ticktext: values.map(String) };
  }

  const axis = (title, more) => Object.assign({
    title: { text: title, standoff: 10 }, gridcolor: colour("grid"), linecolor: colour("line"),
    zerolinecolor: colour("line"), automargin: true, ticks: "outside", tickcolor: colour("line"),
  }, more);

  function layout(more) {
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text") },
      margin: { l: 52, r: 34, t: 28, b: 48 },
      // Above the plot, so that no legend ever covers an axis title; from the top of the figure, since plotly then keeps
      // room for as many rows as there are.
      legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 1, yanchor: "top" },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left" },
      modebar: { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
      hovermode: "closest", uirevision: "keep",
      // A finger that drags over a figure wants to scroll the page.
      dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
    }, more);
  }

  // Small figures side by side, as many in a row as the place has room for: axes, titles and heights.
  function panels(place, titles, x, y) {
    const columns = Math.max(1, Math.min(titles.length, Math.floor(place.clientWidth / 250)));
    const rows = Math.ceil(titles.length / columns), gap = 0.25 / rows;
    place.style.height = (80 + 270 * rows) + "px";
    const made = { annotations: [] };
    titles.forEach((title, i) => {
      const column = i % columns, row = Math.floor(i / columns), end = i ? i + 1 : "";
      const width = 1 / columns, top = 1 - row / rows, bottom = 1 - (row + 1) / rows;
      const across = [column * width + (column ? 0.035 : 0), (column + 1) * width - (column < columns - 1 ? 0.015 : 0)];
      const upward = [row < rows - 1 ? bottom + gap : bottom, top - (rows > 1 ? 0.04 : 0)];
      made["xaxis" + end] = axis(row === rows - 1 ? x.title : "", Object.assign({ domain: across, anchor: "y" + end }, x.more));
      made["yaxis" + end] = axis(column ? "" : y.title, Object.assign({ domain: upward, anchor: "x" + end, matches: i ? "y" : undefined }, y.more));
      made.annotations.push({
        text: title, showarrow: false, xref: "paper", yref: "paper", x: across[0], xanchor: "left", y: upward[1], yanchor: "bottom",
        font: { size: 13, color: colour("soft") },
      });
    });
    return { axes: made, of: (i) => ({ xaxis: "x" + (i ? i + 1 : ""), yaxis: "y" + (i ? i + 1 : "") }) };
  }

  // ---------------------------------------------------------------- figures

  const figures = {};

  // It is two thirds of the page even when packed, and needs no more than a moment to unpack.
  async function unpackPlotly() {
    const packed = bytes(document.getElementById("plotly-packed").textContent), script = document.createElement("script");
    const unpacked = new Response(packed).body.pipeThrough(new DecompressionStream("deflate"));
    script.textContent = await new Response(unpacked).text();
    document.head.append(script);
    script.remove();
  }
  const plotly = unpackPlotly().catch(() => {
    const note = "This browser is too old to unpack the figures (it has no DecompressionStream); the numbers are in the tables too.";
    document.querySelectorAll(".plot").forEach((place) => { place.textContent = note; place.style.height = "auto"; });
    throw new Error(note);
  });

  // Plotly offers to send the data to its own servers; these pages never do.
  const config = {
    displaylogo: false, displayModeBar: window.innerWidth < 600 ? false : "hover", showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  };
  // Not only the window's size counts: a scroll bar or a zoom narrows a figure too.
  const sizes = new ResizeObserver((changes) => changes.forEach((change) => Plotly.Plots.resize(change.target)));

  function draw(name) {
    const place = document.getElementById("plot-" + name);
    const figure = place && figures[name](place);
    if (place) place.closest("figure").hidden = !figure;
    if (!figure) return Promise.resolve();
    const paper = printing() ? { width: place.clientWidth, height: place.clientHeight } : {};
    return plotly.then(() => Plotly.react(place, figure.data, Object.assign(figure.layout, paper), config)).then(() => sizes.observe(place));
  }

  function drawAll() {
    return Promise.all(Object.keys(figures).map(draw)).then(() => { root.dataset.drawn = "yes"; });
  }
  dark.addEventListener("change", drawAll);

  // On paper the figures have its width, and are dark on white whatever the screen is.
  const printing = () => root.dataset.printing !== undefined;
  window.addEventListener("beforeprint", () => { root.dataset.printing = "yes"; drawAll(); });
  window.addEventListener("afterprint", () => { delete root.dataset.printing; drawAll(); });

  // Chromium opens a folded part for a link into it and knows its width before; other browsers need both done for them.
  document.querySelectorAll("details.section").forEach((part) => part.addEventListener("toggle", () => {
    if (part.open) part.querySelectorAll("[id^=plot-]").forEach((place) => draw(place.id.slice("plot-".length)));
  }));
  function reveal() {
    const target = document.getElementById(window.location.hash.slice(1)), part = target && target.closest("details");
    if (part) { part.open = true; target.scrollIntoView(); }
  }
  window.addEventListener("hashchange", reveal);
  document.querySelectorAll("nav a").forEach((link) => link.addEventListener("click", () => setTimeout(reveal)));

  // ---------------------------------------------------------------- announcements and copies

  const status = document.getElementById("status");
  let waiting = null;
  // A screen reader is told at most twice a second, and always the last.
  function announce(text) {
    clearTimeout(waiting);
    waiting = setTimeout(() => { status.textContent = text; }, 500);
  }

  function copyText(text) {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text).catch(() => copyBySelection(text));
    return copyBySelection(text);
  }

  // Where a page from a file may not use the clipboard itself.
  function copyBySelection(text) {
    const area = document.createElement("textarea"), before = document.activeElement;
    area.value = text;
    area.className = "hidden-text";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (before) before.focus();
    return done ? Promise.resolve() : Promise.reject(new Error("the browser refused"));
  }

  // A cell in one line: what is written small below a number follows it in brackets.
  function cellText(cell) {
    const small = [...cell.querySelectorAll("small")].map((note) => note.textContent.trim()).filter(Boolean);
    const rest = [...cell.childNodes].filter((node) => node.nodeName !== "SMALL").map((node) => node.textContent).join("");
    const text = rest.trim() ? rest + (small.length ? " (" + small.join("; ") + ")" : "") : small.join("; ");
    return text.replace(/\s+/g, " ").trim();
  }

  function tableText(table) {
    const grouped = table.querySelector('th[scope="rowgroup"]') !== null, lines = [];
    let group = "";
    for (const row of table.rows) {
      const heading = row.querySelector('th[scope="rowgroup"]');
      if (heading) { group = cellText(heading); continue; }
      const cells = [...row.cells].map(cellText);
      lines.push((grouped ? [row.parentNode.nodeName === "THEAD" ? "group" : group, ...cells] : cells).join("\t"));
    }
    return lines.join("\n") + "\n";
  }

  function offerCopies() {
    document.querySelectorAll("button.copy").forEach((button) => {
      const label = button.textContent;
      button.hidden = false;
      button.addEventListener("click", () => {
        const source = button.dataset.text === undefined ? tableText(button.parentNode.querySelector("table")) : button.dataset.text;
        copyText(source).then(() => "Copied", () => "Not copied").then((said) => {
          button.textContent = said;
          announce(said === "Copied" ? "Copied to the clipboard" : "The browser did not allow the copy");
          setTimeout(() => { button.textContent = label; }, 2000);
        });
      });
    });
  }

  return {
    report, bytes, DASHES, SYMBOLS, escaped, colour, armColour, exitColour, percent, millions, images, interval, errors, logTicks, axis, layout,
    panels, figures, draw, drawAll, announce, offerCopies,
  };
})();
