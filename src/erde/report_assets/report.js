// Draws the figures of an erde report from the JSON in #report-data, in the colours of the page's theme.
(function () {
  "use strict";
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const arms = report.order.map((name) => readArm(name, report.arms[name]));
  const exported = arms.find((arm) => arm.exported);
  // A teacher this many times as costly as the dearest student gets its own view of the first figure.
  const FAR = 1.5;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const DASHES = ["dash", "dot", "dashdot", "longdashdot", "longdash"];
  const SYMBOLS = ["circle", "square", "triangle-up", "diamond", "pentagon", "hexagon", "star", "cross"];
  const students = studentArms();
  let view = students ? "students" : "linear";

  function readArm(name, arm) {
    const single = arm.exits.length === 1;
    const bounds = (one) => ({ accuracy: one.accuracy, low: one.accuracy_interval[0], high: one.accuracy_interval[1] });
    const exits = arm.exits.map((one, i) => Object.assign(bounds(one), {
      name: arm.cost[i].name, macs: arm.cost[i].macs, share: arm.cost[i].macs / arm.no_exit_macs,
    }));
    const points = arm.operating_points.filter((one) => one.test).map((one) => Object.assign(bounds(one.test), {
      label: one.name, standard: one.name === arm.default_operating_point, certified: one.certificate !== null,
      macs: one.test.macs, saved: one.test.macs_saved, risk: one.test.risk,
    }));
    // A network with one exit is one point, whatever its operating points are called.
    const only = Object.assign({}, exits[0], { label: "one exit", standard: true, saved: 1 - exits[0].share });
    return {
      name: name, exported: name === report.exported, single: single, role: arm.role, exits: exits,
      points: single ? [only] : points, curve: single ? null : arm.curve, macs: arm.no_exit_macs, losses: arm.losses,
      candidates: arm.score_candidates.map((one) => Object.assign({}, one, {
        chosen: one.score === arm.score && one.sharpness === arm.sharpness,
      })),
    };
  }

  // The arms of the first view where the teacher is far to the right; null where all arms fit one view.
  function studentArms() {
    const dearest = (list) => Math.max(...list.flatMap((arm) => [arm.macs, ...arm.exits.map((one) => one.macs)]));
    const teachers = arms.filter((arm) => arm.role === "teacher"), others = arms.filter((arm) => arm.role !== "teacher");
    return teachers.length && others.length && dearest(teachers) > FAR * dearest(others) ? others : null;
  }

  // What is drawn of `list`, with a margin: plotly's own ranges cut lines off at the edge.
  function ranges(list) {
    const shares = list.flatMap((arm) => [
      ...arm.points.flatMap((one) => (one.standard ? [one.low, one.high] : [one.accuracy])), ...(arm.curve ? arm.curve.accuracy : []),
    ]);
    const macs = list.flatMap((arm) => [arm.macs, ...arm.points.map((one) => one.macs), ...(arm.curve ? arm.curve.macs : [])]);
    const low = Math.min(...shares), high = Math.max(...shares), margin = Math.max(0.005, 0.06 * (high - low));
    return { macs: [0.93 * Math.min(...macs) / 1e6, 1.05 * Math.max(...macs) / 1e6], accuracy: [100 * (low - margin), 100 * (high + margin)] };
  }

  // 1, 2 and 5 times the powers of ten from `low` to `high`: plotly labels only some of them in full.
  function logTicks(low, high) {
    const values = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      [1, 2, 5].forEach((one) => values.push(Number((one * 10 ** power).toPrecision(2))));
    }
    return { type: "log", tickmode: "array", tickvals: values, ticktext: values.map(String) };
  }

  // Plotly reads a little HTML in every text: data must arrive escaped.
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const armColour = (index) => colour("arm-" + (index % 8));
  // The exported arm is the solid, thicker line.
  const line = (arm, index) => ({
    color: armColour(index), dash: arm.exported ? "solid" : DASHES[index % DASHES.length], width: arm.exported ? 3 : 2,
  });
  const percent = (share, digits) => (100 * share).toFixed(digits === undefined ? 1 : digits) + " %";
  const millions = (macs) => {
    const value = macs / 1e6;
    return value >= 100 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : String(Number(value.toPrecision(3)));
  };
  const interval = (one) => percent(one.accuracy) + " (" + percent(one.low) + " to " + percent(one.high) + ")";
  const errors = (list, shown) => ({
    type: "data", symmetric: false, thickness: 1, width: 3,
    array: list.map((one) => (!shown || shown(one) ? 100 * (one.high - one.accuracy) : 0)),
    arrayminus: list.map((one) => (!shown || shown(one) ? 100 * (one.accuracy - one.low) : 0)),
  });
  const axis = (title, more) => Object.assign({
    title: { text: title, standoff: 10 }, gridcolor: colour("grid"), linecolor: colour("line"),
    zerolinecolor: colour("line"), automargin: true, ticks: "outside", tickcolor: colour("line"),
  }, more);

  function layout(x, y, more) {
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("text") },
      margin: { l: 52, r: 12, t: 28, b: 48 },
      // Above the plot, so that no legend ever covers an axis title.
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.03, yanchor: "bottom" },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
      hovermode: "closest", uirevision: "keep", xaxis: x, yaxis: y,
      // A finger that drags over a figure wants to scroll the page.
      dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
    }, more);
  }

  function tradeoff() {
    const data = [];
    arms.forEach((arm, index) => {
      const name = escaped(arm.name), stroke = armColour(index);
      const shared = { name: name, legendgroup: name, hoverinfo: "text" };
      if (arm.curve) {
        data.push(Object.assign({}, shared, {
          type: "scatter", mode: "lines", x: arm.curve.macs.map((macs) => macs / 1e6),
          y: arm.curve.accuracy.map((share) => 100 * share),
          line: line(arm, index),
          text: arm.curve.macs.map((macs, i) => `<b>${name}</b><br>${percent(arm.curve.accuracy[i])} at ${millions(macs)} M MACs` +
            `<br>risk ${percent(arm.curve.risk[i], 2)}<br>leave: ${arm.curve.exit_rates[i].map((rate) => percent(rate)).join(", ")}`),
        }));
      }
      if (!arm.points.length) return;
      data.push(Object.assign({}, shared, {
        type: "scatter", mode: "markers", showlegend: !arm.curve,
        x: arm.points.map((one) => one.macs / 1e6), y: arm.points.map((one) => 100 * one.accuracy),
        // Intervals of all points would hide each other; the others' are in the hover text.
        error_y: Object.assign(errors(arm.points, (one) => one.standard), { color: stroke }),
        marker: {
          color: stroke, opacity: 1, symbol: arm.points.map((one) => SYMBOLS[index % 8] + (one.certified || arm.single ? "" : "-open")),
          size: arm.points.map((one) => (one.standard ? 14 : 9)), line: { width: 2, color: stroke },
        },
        text: arm.points.map((one) => `<b>${name}, ${escaped(one.label)}</b><br>${interval(one)}<br>` +
          `${millions(one.macs)} M MACs, ${percent(one.saved)} saved` +
          (arm.single ? "" : `<br>risk ${percent(one.risk, 2)}<br>${one.certified ? "certified" : "not certified"}`)),
      }));
    });
    return { data: data, layout: tradeoffLayout() };
  }

  function tradeoffLayout() {
    const everything = view === "all", at = exported.macs / 1e6;
    const range = ranges(everything || !students ? arms : students);
    const logarithmic = everything ? Object.assign(logTicks(...range.macs), { range: range.macs.map(Math.log10) }) : { range: range.macs };
    const x = axis("MACs per image (millions" + (everything ? ", log scale)" : ")"), logarithmic);
    const y = axis("test accuracy (%)", { range: range.accuracy });
    return layout(x, y, {
      uirevision: view,
      shapes: [{ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: colour("soft"), width: 1.5, dash: "dash" } }],
      annotations: [{
        x: everything ? Math.log10(at) : at, yref: "paper", y: 0.02, yanchor: "bottom", xanchor: "right", showarrow: false,
        textangle: -90, text: escaped(exported.name) + " without exits", font: { color: colour("soft"), size: 12 },
      }],
    });
  }

  function exits() {
    const data = arms.map((arm, index) => ({
      type: "scatter", mode: arm.exits.length > 1 ? "lines+markers" : "markers", name: escaped(arm.name), hoverinfo: "text",
      x: arm.exits.map((one) => 100 * one.share), y: arm.exits.map((one) => 100 * one.accuracy),
      error_y: Object.assign(errors(arm.exits), { color: armColour(index) }),
      line: line(arm, index),
      marker: { color: armColour(index), symbol: SYMBOLS[index % 8], size: 9 },
      text: arm.exits.map((one, i) => `<b>${escaped(arm.name)}, exit ${i}</b> (${escaped(one.name)})<br>${interval(one)}` +
        `<br>${millions(one.macs)} M MACs, ${percent(one.share)} of no exits`),
    }));
    return { data: data, layout: layout(axis("MACs up to the exit (% of no exits)", { rangemode: "tozero" }), axis("test accuracy (%)", {})) };
  }

  function scores() {
    const chosen = exported.candidates.find((one) => one.chosen) || {};
    const names = [...new Set(exported.candidates.map((one) => one.score))];
    const data = names.map((name, index) => {
      const mine = exported.candidates.filter((one) => one.score === name).sort((a, b) => a.sharpness - b.sharpness);
      return {
        type: "scatter", mode: "lines+markers", name: escaped(name), hoverinfo: "text",
        x: mine.map((one) => one.sharpness), y: mine.map((one) => 100 * one.macs_saved),
        line: { color: armColour(index), dash: name === chosen.score ? "solid" : DASHES[index % DASHES.length] },
        marker: {
          color: armColour(index), opacity: 1, symbol: SYMBOLS[index % 8], size: mine.map((one) => (one.chosen ? 15 : 8)),
          line: { width: mine.map((one) => (one.chosen ? 2 : 0)), color: colour("text") },
        },
        text: mine.map((one) => `<b>${escaped(name)}</b>, sharpness ${one.sharpness}<br>${percent(one.macs_saved)} of MACs saved` + (one.chosen ? "<br>chosen" : "")),
      };
    });
    const values = [...new Set(exported.candidates.map((one) => one.sharpness))].sort((a, b) => a - b);
    const x = axis("sharpness (log scale)", { type: "log", tickmode: "array", tickvals: values, ticktext: values.map(String) });
    return { data: data, layout: layout(x, axis("MACs saved on tune (%)", {})) };
  }

  function history() {
    const known = arms.map((arm, index) => ({ arm: arm, index: index })).filter((one) => one.arm.losses.length);
    const all = known.flatMap((one) => one.arm.losses.map((epoch) => epoch.loss));
    const logarithmic = Math.min(...all) > 0 && Math.max(...all) / Math.min(...all) > 10;
    const data = known.map(({ arm, index }) => ({
      type: "scatter", mode: arm.losses.length > 1 ? "lines" : "markers", name: escaped(arm.name), hoverinfo: "text",
      x: arm.losses.map((_, i) => i + 1), y: arm.losses.map((one) => one.loss),
      line: line(arm, index),
      text: arm.losses.map((one, i) => `<b>${escaped(arm.name)}</b>, epoch ${i + 1} (${one.phase})<br>loss ${one.loss.toPrecision(4)}` +
        `<br>learning rate ${one.rate.toPrecision(3)}`),
    }));
    const y = axis("training loss" + (logarithmic ? " (log scale)" : ""), logarithmic ? logTicks(Math.min(...all), Math.max(...all)) : {});
    return { data: data, layout: layout(axis("epoch", {}), y) };
  }

  const figures = { tradeoff: tradeoff, exits: exits, scores: scores, history: history };
  // Plotly offers to send the data to its own servers; this page never does.
  const config = {
    displaylogo: false, displayModeBar: window.innerWidth < 600 ? false : "hover", showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
  };

  // Not only the window's size counts: a scroll bar or a zoom narrows a figure too.
  const sizes = new ResizeObserver((changes) => changes.forEach((one) => Plotly.Plots.resize(one.target)));

  function draw(name) {
    const place = document.getElementById("plot-" + name);
    if (!place) return Promise.resolve();
    const figure = figures[name]();
    return Plotly.react(place, figure.data, figure.layout, config).then(() => sizes.observe(place));
  }

  function drawAll() {
    return Promise.all(Object.keys(figures).map(draw)).then(() => { document.documentElement.dataset.drawn = "yes"; });
  }

  document.querySelectorAll("[data-view]").forEach((button) => button.addEventListener("click", () => {
    view = button.dataset.view;
    document.querySelectorAll("[data-view]").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    draw("tradeoff");
  }));
  dark.addEventListener("change", drawAll);
  document.querySelectorAll(".choices").forEach((one) => { one.hidden = !students; });
  drawAll();
})();
