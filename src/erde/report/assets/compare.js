// The figure of a comparison: one series per recipe and arm, with a line for each of its runs.
(function () {
  "use strict";
  const { report, DASHES, SYMBOLS, escaped, armColour, percent, millions, interval, errors, axis, layout } = erde;
  const shown = new Set(report.shown);
  let paper = true;

  function lines(series) {
    const name = escaped(series.label), shared = { name, legendgroup: name, hoverinfo: "text" };
    const stroke = { color: armColour(series.colour), dash: series.shape ? DASHES[series.shape % DASHES.length] : "solid", width: series.lines.length > 1 ? 1.5 : 2.5 };
    const trace = (line, curve, more) => Object.assign({}, shared, {
      type: "scatter", mode: "lines", x: curve.macs.map((macs) => macs / 1e6), y: curve.accuracy.map((share) => 100 * share),
      text: curve.macs.map((macs, i) => `<b>${escaped(line.run)}/${escaped(series.arm)}</b><br>${percent(curve.accuracy[i])} at ${millions(macs)} M MACs` +
        `<br>risk ${percent(curve.risk[i], 2)}`),
    }, more);
    const made = series.lines.filter((line) => line.curve).map((line, i) => trace(line, line.curve, { line: stroke, showlegend: i === 0 }));
    const extra = paper ? series.lines.filter((line) => line.paper) : [];
    made.push(...extra.map((line) => trace(line, line.paper, { line: { color: stroke.color, dash: "dot", width: 1 }, showlegend: false })));
    const points = series.lines.filter((line) => line.point).map((line) => Object.assign({ run: line.run }, line.point));
    if (points.length) {
      made.push(Object.assign({}, shared, {
        type: "scatter", mode: "markers", showlegend: !series.lines.some((line) => line.curve),
        x: points.map((point) => point.macs / 1e6), y: points.map((point) => 100 * point.accuracy),
        error_y: Object.assign(errors(points), { color: stroke.color }),
        marker: { color: stroke.color, symbol: points.map((point) => SYMBOLS[series.shape % 8] + (point.certified ? "" : "-open")), size: 11, line: { width: 2, color: stroke.color } },
        text: points.map((point) => `<b>${escaped(point.run)}/${escaped(series.arm)}</b><br>${interval(point)}<br>${millions(point.macs)} M MACs`),
      }));
    }
    return made;
  }

  function tradeoff() {
    return { data: report.series.filter((series) => shown.has(series.arm)).flatMap(lines), layout: layout({
      uirevision: [...shown].join() + paper, xaxis: axis("MACs per image (millions)", {}), yaxis: axis("test accuracy (%)", {}),
    }) };
  }

  document.getElementById("choose-arms").append(...report.arms.map((name) => {
    const label = document.createElement("label"), box = document.createElement("input");
    box.type = "checkbox";
    box.checked = shown.has(name);
    box.addEventListener("change", () => {
      if (box.checked) shown.add(name); else shown.delete(name);
      erde.draw("tradeoff");
    });
    label.append(box, name);
    return label;
  }));
  document.getElementById("choose-paper").addEventListener("change", (event) => {
    paper = event.target.checked;
    erde.draw("tradeoff");
  });
  Object.assign(erde.figures, { tradeoff });
  erde.offerCopies();
  erde.drawAll();
})();
