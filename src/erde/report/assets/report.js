// The figures of a run's report, in the colours of the page's theme.
(function () {
  "use strict";
  const { report, DASHES, SYMBOLS, escaped, colour, armColour, exitColour, percent, millions, images, interval, errors, logTicks, axis, layout } = erde;
  const { state } = erde.explore;
  const arms = report.order.map((name) => readArm(name, report.arms[name]));
  const exported = arms.find((arm) => arm.exported);
  const shownArm = () => arms.find((arm) => arm.name === state.arm);
  // A teacher this many times as costly as the dearest student gets its own view of the first figure.
  const FAR = 1.5;
  const students = studentArms();
  const timed = arms.some((arm) => arm.curve && arm.curve.milliseconds);
  let view = students ? "students" : "linear", cost = "macs";
  const shown = { paper: true, oracle: false };

  function readArm(name, arm) {
    const single = arm.exits.length === 1;
    const bounds = (measured) => ({ accuracy: measured.accuracy, low: measured.accuracy_interval[0], high: measured.accuracy_interval[1] });
    const exits = arm.exits.map((exit, i) => Object.assign(bounds(exit), {
      name: arm.cost[i].name, macs: arm.cost[i].macs, share: arm.cost[i].macs / arm.no_exit_macs, ece: exit.ece, reliability: exit.reliability,
    }));
    const points = arm.operating_points.filter((point) => point.test).map((point) => Object.assign(bounds(point.test), {
      label: point.name, standard: point.name === arm.default_operating_point, certified: point.certificate !== null,
      macs: point.test.macs, milliseconds: point.test.milliseconds, saved: point.test.macs_saved, risk: point.test.risk,
    }));
    // A network with one exit is one point, whatever its operating points are called.
    const only = Object.assign({}, exits[0], {
      label: "one exit", standard: true, saved: 1 - exits[0].share, milliseconds: points.length ? points[0].milliseconds : null,
    });
    return {
      name, single, exits, exported: name === report.exported, role: arm.role, points: single ? [only] : points,
      curve: single ? null : arm.curve, paper: single ? null : arm.paper_curve, oracle: single ? null : arm.oracle, macs: arm.no_exit_macs,
      losses: arm.losses, classes: arm.classes, entropies: arm.entropies, rule: arm.rule,
      candidates: arm.score_candidates.map((candidate) => Object.assign({}, candidate, {
        chosen: candidate.score === arm.score && candidate.sharpness === arm.sharpness && candidate.ensemble === arm.ensemble,
      })),
    };
  }

  // The arms of the first view where the teacher is far to the right; null where all arms fit one view.
  function studentArms() {
    const dearest = (list) => Math.max(...list.flatMap((arm) => [arm.macs, ...arm.exits.map((exit) => exit.macs)]));
    const teachers = arms.filter((arm) => arm.role === "teacher"), others = arms.filter((arm) => arm.role !== "teacher");
    return teachers.length && others.length && dearest(teachers) > FAR * dearest(others) ? others : null;
  }

  // The exported arm is the solid, thicker line.
  const line = (arm, index) => ({
    color: armColour(index), dash: arm.exported ? "solid" : DASHES[index % DASHES.length], width: arm.exported ? 3 : 2,
  });

  // ---------------------------------------------------------------- accuracy against cost

  // What stands on the first axis: millions of MACs, or milliseconds; undefined where it is not known.
  const costs = (priced) => (cost === "macs" ? priced.macs.map((macs) => macs / 1e6) : priced.milliseconds || []);
  const costOf = (priced) => (cost === "macs" ? priced.macs / 1e6 : priced.milliseconds);
  const known = (value) => value !== null && value !== undefined;

  // What is drawn of `list`, with a margin: plotly's own ranges cut lines off at the edge.
  function ranges(list) {
    const mine = shownArm();
    const curves = list.flatMap((arm) => [arm.curve, shown.paper && arm === mine ? arm.paper : null]).filter(Boolean);
    const oracle = shown.oracle && cost === "macs" && mine.oracle ? [mine.oracle] : [];
    const shares = [
      ...list.flatMap((arm) => arm.points.flatMap((point) => (point.standard ? [point.low, point.high] : [point.accuracy]))),
      ...curves.flatMap((curve) => curve.accuracy), ...oracle.map((curve) => curve.accuracy),
    ];
    const along = [
      ...(cost === "macs" ? list.map((arm) => arm.macs / 1e6) : []), ...list.flatMap((arm) => arm.points.map(costOf).filter(known)),
      ...curves.flatMap(costs), ...oracle.map((point) => point.macs / 1e6),
    ];
    const low = Math.min(...shares), high = Math.max(...shares), margin = Math.max(0.005, 0.06 * (high - low));
    return { cost: [0.93 * Math.min(...along), 1.05 * Math.max(...along)], accuracy: [100 * (low - margin), 100 * (high + margin)] };
  }

  function curveTrace(arm, curve, title, shared, stroke) {
    return Object.assign({}, shared, {
      type: "scatter", mode: "lines", x: costs(curve), y: curve.accuracy.map((share) => 100 * share), line: stroke,
      text: curve.macs.map((macs, i) => `<b>${title}</b><br>${percent(curve.accuracy[i])} at ${millions(macs)} M MACs` +
        (curve.milliseconds ? ` (${curve.milliseconds[i].toFixed(2)} ms)` : "") +
        `<br>risk ${percent(curve.risk[i], 2)}<br>leave: ${curve.exit_rates[i].map((rate) => percent(rate)).join(", ")}`),
    });
  }

  function pointTrace(arm, index, shared) {
    const stroke = armColour(index), points = arm.points.filter((point) => known(costOf(point)));
    return Object.assign({}, shared, {
      type: "scatter", mode: "markers", showlegend: !arm.curve, x: points.map(costOf), y: points.map((point) => 100 * point.accuracy),
      // Intervals of all points would hide each other; the others' are in the hover text.
      error_y: Object.assign(errors(points, (point) => point.standard), { color: stroke }),
      marker: {
        color: stroke, opacity: 1, symbol: points.map((point) => SYMBOLS[index % 8] + (point.certified || arm.single ? "" : "-open")),
        size: points.map((point) => (point.standard ? 14 : 9)), line: { width: 2, color: stroke },
      },
      text: points.map((point) => `<b>${escaped(arm.name)}, ${escaped(point.label)}</b><br>${interval(point)}<br>` +
        `${millions(point.macs)} M MACs, ${percent(point.saved)} saved` + (known(point.milliseconds) ? `<br>${point.milliseconds.toFixed(2)} ms` : "") +
        (arm.single ? "" : `<br>risk ${percent(point.risk, 2)}<br>${point.certified ? "certified" : "not certified"}`)),
    });
  }

  function extraTraces() {
    const arm = shownArm(), index = arms.indexOf(arm), name = escaped(arm.name), made = [];
    if (shown.paper && arm.paper) {
      const title = `${name}, the paper's rule`;
      made.push(curveTrace(arm, arm.paper, title, { name: title, hoverinfo: "text", legendrank: 2000 }, { color: armColour(index), dash: "dot", width: 1.5 }));
    }
    if (shown.oracle && arm.oracle && cost === "macs") {
      made.push({
        type: "scatter", mode: "markers", name: `${name}, oracle`, hoverinfo: "text", legendrank: 2001, x: [arm.oracle.macs / 1e6], y: [100 * arm.oracle.accuracy],
        marker: { symbol: "star", size: 15, color: armColour(index) }, text: [`<b>${name}, oracle</b><br>knows the label: no rule does better`],
      });
    }
    const fixed = arms.filter((arm) => arm.single && known(costOf(arm.points[0]))).map((arm) => arm.points[0]).sort((a, b) => costOf(a) - costOf(b));
    if (fixed.length > 1) {
      made.push({
        type: "scatter", mode: "lines", name: "networks without exits", hoverinfo: "skip", legendrank: 2002, x: fixed.map(costOf), y: fixed.map((point) => 100 * point.accuracy),
        line: { color: colour("soft"), width: 1, dash: "dot" },
      });
    }
    return made;
  }

  // Where the slider stands; always the last trace.
  function markerTrace() {
    const at = state.marker, x = at && (cost === "macs" ? at.macs / 1e6 : at.milliseconds);
    return {
      type: "scatter", mode: "markers", name: "slider", showlegend: false, hoverinfo: "skip", x: known(x) ? [x] : [], y: known(x) ? [100 * at.accuracy] : [],
      marker: { symbol: "circle-open", size: 22, color: colour("text"), line: { width: 3, color: colour("text") } },
    };
  }

  erde.moveMarker = () => {
    const place = document.getElementById("plot-tradeoff"), moved = markerTrace();
    if (place.data) Plotly.restyle(place, { x: [moved.x], y: [moved.y] }, [place.data.length - 1]);
  };

  function tradeoff() {
    const data = extraTraces();
    arms.forEach((arm, index) => {
      const shared = { name: escaped(arm.name), legendgroup: escaped(arm.name), hoverinfo: "text" };
      if (arm.curve) data.push(curveTrace(arm, arm.curve, escaped(arm.name), shared, line(arm, index)));
      if (arm.points.length) data.push(pointTrace(arm, index, shared));
    });
    data.push(markerTrace());
    return { data, layout: tradeoffLayout() };
  }

  function tradeoffLayout() {
    const everything = view === "all", at = exported.macs / 1e6, range = ranges(everything || !students ? arms : students);
    const along = everything ? Object.assign(logTicks(...range.cost), { range: range.cost.map(Math.log10) }) : { range: range.cost };
    const unit = cost === "macs" ? ["MACs per image", "millions"] : ["time per image", "ms"];
    const made = {
      uirevision: view + cost + state.arm + shown.oracle, xaxis: axis(`${unit[0]} (${unit[1]}${everything ? ", log scale" : ""})`, along),
      yaxis: axis("test accuracy (%)", { range: range.accuracy }),
    };
    if (cost !== "macs") return layout(made);
    return layout(Object.assign(made, {
      shapes: [{ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, layer: "below", line: { color: colour("soft"), width: 1.5, dash: "dash" } }],
      annotations: [{
        x: everything ? Math.log10(at) : at, yref: "paper", y: 0.02, yanchor: "bottom", xanchor: "right", showarrow: false,
        textangle: -90, text: escaped(exported.name) + " without exits", font: { color: colour("soft"), size: 12 },
      }],
    }));
  }

  // ---------------------------------------------------------------- exits, probabilities, classes, entropies

  function exits() {
    const data = arms.map((arm, index) => ({
      type: "scatter", mode: arm.exits.length > 1 ? "lines+markers" : "markers", name: escaped(arm.name), hoverinfo: "text",
      x: arm.exits.map((exit) => 100 * exit.share), y: arm.exits.map((exit) => 100 * exit.accuracy),
      error_y: Object.assign(errors(arm.exits), { color: armColour(index) }), line: line(arm, index),
      marker: { color: armColour(index), symbol: SYMBOLS[index % 8], size: 9 },
      text: arm.exits.map((exit, i) => `<b>${escaped(arm.name)}, exit ${i}</b> (${escaped(exit.name)})<br>${interval(exit)}` +
        `<br>${millions(exit.macs)} M MACs, ${percent(exit.share)} of no exits`),
    }));
    return { data, layout: layout({ xaxis: axis("MACs up to the exit (% of no exits)", { rangemode: "tozero" }), yaxis: axis("test accuracy (%)", {}) }) };
  }

  function reliability(place) {
    const arm = shownArm(), titles = arm.exits.map((exit, i) => `exit ${i}: ECE ${percent(exit.ece)}`);
    const whole = { range: [0, 102], dtick: 25 };
    const made = erde.panels(place, titles, { title: "confidence (%)", more: whole }, { title: "right (%)", more: whole });
    const data = arm.exits.flatMap((exit, i) => {
      const bins = exit.reliability, most = Math.max(...bins.count), filled = bins.count.map((_, at) => at).filter((at) => bins.count[at] > 0);
      return [
        Object.assign({ type: "scatter", mode: "lines", x: [0, 100], y: [0, 100], hoverinfo: "skip", line: { color: colour("soft"), width: 1, dash: "dash" } }, made.of(i)),
        Object.assign({
          type: "scatter", mode: "lines+markers", hoverinfo: "text", line: { color: colour("accent"), width: 1.5 },
          x: filled.map((at) => 100 * bins.confidence[at]), y: filled.map((at) => 100 * bins.accuracy[at]),
          // Markers at 0 and 100 % are whole.
          cliponaxis: false,
          marker: { color: colour("accent"), opacity: 0.85, size: filled.map((at) => 5 + 17 * Math.sqrt(bins.count[at] / most)) },
          text: filled.map((at) => `confidence ${percent(bins.confidence[at])}<br>right ${percent(bins.accuracy[at])}<br>${images(bins.count[at])}`),
        }, made.of(i)),
      ];
    });
    return { data, layout: layout(Object.assign(made.axes, { showlegend: false, uirevision: state.arm })) };
  }

  function classes(place) {
    const arm = shownArm(), easy = [...arm.classes].sort((a, b) => a.exit_rates[0] - b.exit_rates[0]);
    if (arm.single || !easy.length) return null;
    place.style.height = (90 + 26 * easy.length) + "px";
    const labels = easy.map((row) => `${escaped(row.name.length > 24 ? row.name.slice(0, 23) + "…" : row.name)} `);
    const data = arm.exits.map((_, i) => ({
      type: "bar", orientation: "h", name: `exit ${i}`, hoverinfo: "text", x: easy.map((row) => 100 * row.exit_rates[i]), y: labels.map((_label, at) => at),
      marker: { color: exitColour(i, arm.exits.length), line: { width: 1, color: colour("card") } },
      text: easy.map((row) => `<b>${escaped(row.name)}</b><br>exit ${i}: ${percent(row.exit_rates[i])}<br>drop ${row.signed_drop} points, ${images(row.images)}`),
      textposition: "none",
    }));
    const drops = easy.map((row, at) => ({
      xref: "paper", x: 1.005, xanchor: "left", y: at, text: row.signed_drop, showarrow: false, font: { size: 12, color: colour(row.drop > 0.02 ? "warn" : "soft") },
    }));
    return { data, layout: layout({
      barmode: "stack", bargap: 0.25, uirevision: state.arm, margin: { l: 52, r: 80, t: 28, b: 48 }, legend: { orientation: "h", x: 0, yref: "container", y: 1, yanchor: "top", traceorder: "normal" },
      xaxis: axis("share of the class's test images (%)", { range: [0, 100] }),
      yaxis: axis("", { tickmode: "array", tickvals: labels.map((_label, at) => at), ticktext: labels, ticks: "" }), annotations: drops,
    }) };
  }

  function entropies(place) {
    const arm = shownArm();
    if (!arm.entropies) return null;
    const titles = arm.exits.map((_, i) => `exit ${i}`), bins = arm.entropies.teacher_right[0].length;
    // A step at each edge of a bin; the last value is repeated, since a line ends at its last point.
    const edges = Array.from({ length: bins + 1 }, (_, i) => i / bins), steps = (values) => [...values, values[bins - 1]];
    const made = erde.panels(place, titles, { title: "entropy / ln K", more: { range: [0, 1], dtick: 0.25 } }, { title: "share of the images (%)", more: { rangemode: "tozero" } });
    const kinds = [["teacher_right", "teacher right", "accent", "solid"], ["teacher_wrong", "teacher wrong", "warn", "dot"]];
    const data = kinds.flatMap(([key, name, stroke, dash]) => arm.exits.map((_, i) => {
      const counts = arm.entropies[key][i], all = Math.max(1, counts.reduce((sum, count) => sum + count, 0));
      return Object.assign({
        type: "scatter", mode: "lines", name, legendgroup: name, showlegend: i === 0, hoverinfo: "text", x: edges, y: steps(counts.map((count) => (100 * count) / all)),
        line: { color: colour(stroke), dash, width: 2, shape: "hv" }, fill: key === "teacher_right" ? "tozeroy" : "none",
        text: steps(counts.map((count, bin) => `${name}, entropy ${(bin / bins).toFixed(2)} to ${((bin + 1) / bins).toFixed(2)}<br>${images(count)}, ${percent(count / all)}`)),
      }, made.of(i));
    }));
    return { data, layout: layout(Object.assign(made.axes, { uirevision: state.arm, margin: { l: 52, r: 34, t: 56, b: 48 }, legend: { orientation: "h", x: 0, y: 1.09, yanchor: "bottom" } })) };
  }

  // ---------------------------------------------------------------- scores and training

  function scores() {
    if (!exported.candidates.length) return null;
    const chosen = exported.candidates.find((candidate) => candidate.chosen) || {};
    const label = (candidate) => candidate.score + (candidate.ensemble === "none" ? "" : `, ${candidate.ensemble} ensemble`);
    const names = [...new Set(exported.candidates.map(label))];
    const data = names.map((name, index) => {
      const mine = exported.candidates.filter((candidate) => label(candidate) === name).sort((a, b) => a.sharpness - b.sharpness);
      return {
        type: "scatter", mode: "lines+markers", name: escaped(name), hoverinfo: "text", x: mine.map((candidate) => candidate.sharpness), y: mine.map((candidate) => 100 * candidate.macs_saved),
        line: { color: armColour(index), dash: chosen.score && name === label(chosen) ? "solid" : DASHES[index % DASHES.length] },
        marker: {
          color: armColour(index), opacity: 1, symbol: SYMBOLS[index % 8], size: mine.map((candidate) => (candidate.chosen ? 15 : 8)),
          line: { width: mine.map((candidate) => (candidate.chosen ? 2 : 0)), color: colour("text") },
        },
        text: mine.map((candidate) => `<b>${escaped(name)}</b>, sharpness ${candidate.sharpness}<br>${percent(candidate.macs_saved)} of MACs saved` + (candidate.chosen ? "<br>chosen" : "")),
      };
    });
    const values = [...new Set(exported.candidates.map((candidate) => candidate.sharpness))].sort((a, b) => a - b);
    const x = axis("sharpness (log scale)", { type: "log", tickmode: "array", tickvals: values, ticktext: values.map(String) });
    return { data, layout: layout({ xaxis: x, yaxis: axis("MACs saved on tune (%)", {}) }) };
  }

  function history() {
    const listed = arms.map((arm, index) => ({ arm, index })).filter((entry) => entry.arm.losses.length);
    if (!listed.length) return null;
    const all = listed.flatMap((entry) => entry.arm.losses.map((epoch) => epoch.loss));
    const logarithmic = Math.min(...all) > 0 && Math.max(...all) / Math.min(...all) > 10;
    const data = listed.map(({ arm, index }) => ({
      type: "scatter", mode: arm.losses.length > 1 ? "lines" : "markers", name: escaped(arm.name), hoverinfo: "text",
      x: arm.losses.map((_, i) => i + 1), y: arm.losses.map((epoch) => epoch.loss), line: line(arm, index),
      text: arm.losses.map((epoch, i) => `<b>${escaped(arm.name)}</b>, epoch ${i + 1} (${epoch.phase})<br>loss ${epoch.loss.toPrecision(4)}` +
        `<br>learning rate ${epoch.rate.toPrecision(3)}`),
    }));
    const y = axis("training loss" + (logarithmic ? " (log scale)" : ""), logarithmic ? logTicks(Math.min(...all), Math.max(...all)) : {});
    return { data, layout: layout({ xaxis: axis("epoch", {}), yaxis: y }) };
  }

  // ---------------------------------------------------------------- choices

  function choose(attribute, use) {
    document.querySelectorAll(`[data-${attribute}]`).forEach((button) => button.addEventListener("click", () => {
      use(button.dataset[attribute]);
      button.parentNode.querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      erde.draw("tradeoff");
    }));
  }

  choose("view", (value) => { view = value; });
  choose("cost", (value) => { cost = value; });
  document.querySelectorAll("input[data-extra]").forEach((box) => box.addEventListener("change", () => {
    shown[box.dataset.extra] = box.checked;
    erde.draw("tradeoff");
  }));
  document.getElementById("choose-view").hidden = !students;
  document.getElementById("choose-cost").hidden = !timed;
  document.getElementById("choose-extras").hidden = !arms.some((arm) => arm.curve);
  Object.assign(erde.figures, { tradeoff, exits, reliability, classes, entropies, scores, history });
  erde.explore.changes.push(() => ["tradeoff", "reliability", "classes", "entropies"].forEach(erde.draw));
  erde.offerCopies();
  erde.drawAll();
})();
