// The arm that the figures show, and the slider: it moves along an arm's path of thresholds and counts the
// images anew, from the ranks of their scores among the path's thresholds.
erde.explore = (function () {
  "use strict";
  const { report, bytes, percent, millions, announce } = erde;
  const several = report.order.filter((name) => report.arms[name].exits.length > 1);
  const listed = several.length ? several : report.order;
  const first = listed.includes(report.exported) ? report.exported : listed[0];
  const state = { arm: first, marker: null };
  const changes = [];
  const place = document.getElementById("explore");
  const decoded = {};
  const parts = {};
  let point = 0;

  // ---------------------------------------------------------------- counting

  const numbers = (text, width) => {
    const raw = bytes(text);
    return width === 1 ? raw : Uint16Array.from({ length: raw.length / 2 }, (_, i) => raw[2 * i] + 256 * raw[2 * i + 1]);
  };

  function evidence(name) {
    if (!(name in decoded)) {
      const packed = report.evidence[name];
      decoded[name] = packed && Object.assign({}, packed, {
        ranks: numbers(packed.ranks, packed.width), levels: numbers(packed.levels, packed.width), bits: bytes(packed.bits),
        early: packed.exit_macs.length - 1,
      });
      if (packed) decoded[name].points = decoded[name].levels.length / decoded[name].early;
    }
    return decoded[name];
  }

  // An image leaves where its rank is above the level, which is "score > threshold".
  function count(arm, at) {
    const { images, early, ranks, levels, bits } = arm;
    const leaving = new Array(early + 1).fill(0);
    const bit = (row, image) => (bits[(row >> 3) * images + image] >> (row & 7)) & 1;
    let right = 0, lost = 0, won = 0;
    for (let image = 0; image < images; image++) {
      let exit = 0;
      while (exit < early && ranks[exit * images + image] <= levels[at * early + exit]) exit++;
      leaving[exit]++;
      const mine = bit(exit, image), reference = bit(early + 1, image);
      right += mine;
      lost += reference & ~mine;
      won += mine & ~reference;
    }
    const mean = (costs) => leaving.reduce((sum, many, i) => sum + many * costs[i], 0) / images;
    const macs = mean(arm.exit_macs);
    return {
      leaving, right, lost, won, images, macs, saved: 1 - macs / arm.no_exit_macs, accuracy: right / images, risk: lost / images,
      drop: (lost - won) / images, milliseconds: arm.exit_milliseconds ? mean(arm.exit_milliseconds) : null,
      thresholds: arm.thresholds.map((values, k) => { const level = levels[at * early + k]; return level < values.length ? values[level] : null; }),
    };
  }

  // ---------------------------------------------------------------- the panel

  function element(name, attributes, ...children) {
    const made = document.createElement(name);
    Object.entries(attributes || {}).forEach(([key, value]) => made.setAttribute(key, value));
    made.append(...children);
    return made;
  }

  function build() {
    parts.jumps = element("div", { class: "jumps", role: "group", "aria-label": "Named operating points" });
    parts.range = element("input", { type: "range", id: "explore-range", min: "0", step: "1" });
    parts.tiles = element("dl", { class: "tiles live" });
    parts.bar = element("span", { class: "bar", role: "img" });
    parts.rates = element("small", { class: "soft" });
    parts.thresholds = element("code", {});
    parts.copy = element("button", { type: "button", class: "copy inline", "aria-label": "Copy thresholds" }, "Copy");
    parts.link = element("button", { type: "button", class: "copy inline", "aria-label": "Copy a link to this setting" }, "Copy link");
    parts.unknown = element("p", { class: "warn-text", hidden: "" });
    place.prepend(
      parts.unknown,
      element("div", { class: "slide" },
        element("label", { for: "explore-range" }, "Move the operating point"), parts.range,
        element("div", { class: "ends soft small", "aria-hidden": "true" }, element("span", {}, "all leave at the first exit"), element("span", {}, "no early exit")),
        parts.jumps),
      parts.tiles, element("div", { class: "live-rates" }, parts.bar, parts.rates),
      element("p", { class: "soft small" }, "Thresholds here: ", parts.thresholds, " ", parts.copy, " ", parts.link),
    );
    parts.range.addEventListener("input", () => show(evidence(state.arm).points - 1 - Number(parts.range.value), true));
    parts.range.addEventListener("change", remember);
  }

  const namesHere = (arm) => Object.keys(arm.named).filter((name) => arm.named[name] === point);

  // What a link to the setting ends in: the operating point's name, or the place on the path where it has none.
  function fragment() {
    const [name] = namesHere(evidence(state.arm));
    return "#point=" + encodeURIComponent(name === undefined ? point : name) + (state.arm === first ? "" : "&arm=" + encodeURIComponent(state.arm));
  }

  // The address shows the setting; the browser may forbid it for a page from a file.
  function remember() {
    try {
      window.history.replaceState(null, "", fragment());
    } catch (error) { /* then the button still copies the link */ }
  }

  // Another arm: its range, and its named operating points as buttons.
  function showArm() {
    const arm = evidence(state.arm);
    place.hidden = !arm;
    if (!arm) { mark(null); return; }
    parts.range.max = String(arm.points - 1);
    const names = Object.keys(arm.named);
    parts.jumps.replaceChildren(...names.map((name) => {
      const button = element("button", { type: "button" }, name);
      button.addEventListener("click", () => { show(arm.named[name], true); remember(); });
      return button;
    }));
    show(arm.start, false);
  }

  function certified(name) {
    const named = report.arms[state.arm].operating_points.find((candidate) => candidate.name === name);
    return named && named.certificate ? "certified" : "not certified";
  }

  // The path starts with "no early exit", which stands to the right, as in the figure.
  function show(at, tell) {
    const arm = evidence(state.arm);
    point = Math.max(0, Math.min(arm.points - 1, at));
    const counted = count(arm, point);
    const here = namesHere(arm);
    parts.unknown.hidden = true;
    parts.range.value = String(arm.points - 1 - point);
    const named = here.length ? "; operating point " + here.map((name) => name + ", " + certified(name)).join(", ") : "";
    const words = `accuracy ${percent(counted.accuracy)}, ${percent(1 - counted.saved)} of the MACs, risk ${percent(counted.risk, 2)}${named}`;
    parts.range.setAttribute("aria-valuetext", words);
    [...parts.jumps.children].forEach((button) => button.setAttribute("aria-pressed", String(here.includes(button.textContent))));
    showNumbers(arm, counted);
    parts.link.dataset.text = window.location.href.split("#")[0] + fragment();
    document.querySelectorAll("tr[data-point]").forEach((row) => {
      row.setAttribute("aria-current", String(row.dataset.arm === state.arm && here.includes(row.dataset.point)));
    });
    Object.assign(place.dataset, { point, leaving: counted.leaving.join(" "), right: counted.right, lost: counted.lost, won: counted.won, macs: counted.macs });
    mark(counted);
    if (tell) announce(words + "; leaving at " + counted.leaving.map((many, i) => `exit ${i} ${percent(many / counted.images)}`).join(", "));
  }

  function showNumbers(arm, counted) {
    const tiles = [
      ["Test accuracy", percent(counted.accuracy, 2), `${counted.right.toLocaleString("en")} of ${counted.images.toLocaleString("en")}`],
      ["MACs per image", percent(1 - counted.saved), `${millions(counted.macs)} of ${millions(arm.no_exit_macs)} million`],
      ["Risk", percent(counted.risk, 2), `${counted.lost.toLocaleString("en")} images lost by leaving early`],
      ["Net drop of accuracy", percent(counted.drop, 2).replace("%", "points"), `${counted.lost.toLocaleString("en")} lost, ${counted.won.toLocaleString("en")} won`],
    ];
    if (counted.milliseconds !== null) tiles.splice(2, 0, ["Time per image", counted.milliseconds.toFixed(2) + " ms", "from the profile given"]);
    parts.tiles.replaceChildren(...tiles.map(([label, value, note]) => element("div", {},
      element("dt", {}, label), element("dd", {}, value), element("dd", { class: "note" }, note))));
    const rates = counted.leaving.map((many) => many / counted.images);
    parts.bar.replaceChildren(...rates.map((rate, i) => {
      const piece = element("i", {});
      piece.style.setProperty("--share", (100 * rate).toFixed(3) + "%");
      piece.style.setProperty("--mix", (100 * i) / Math.max(rates.length - 1, 1) + "%");
      piece.hidden = rate === 0;
      return piece;
    }));
    parts.bar.setAttribute("aria-label", "Leaving at " + rates.map((rate, i) => `exit ${i}: ${percent(rate)}`).join("; "));
    parts.rates.textContent = "leave at " + rates.map((rate, i) => `exit ${i}: ${percent(rate)}`).join(" · ");
    const texts = counted.thresholds.map((threshold) => (threshold === null ? "null" : String(threshold)));
    parts.thresholds.textContent = counted.thresholds.map((threshold) => (threshold === null ? "off" : Number(threshold.toPrecision(5)))).join(", ");
    parts.copy.dataset.text = "[" + texts.join(", ") + "]";
  }

  // At most sixty times a second, and always the last. A timer, since a page that is not painted gets no frames.
  let moving = null;
  function mark(counted) {
    state.marker = counted;
    moving = moving || setTimeout(() => { moving = null; if (erde.moveMarker) erde.moveMarker(); }, 16);
  }

  // ---------------------------------------------------------------- choices

  const chooseArm = (name) => {
    if (!listed.includes(name)) return;
    state.arm = name;
    document.querySelectorAll("select[data-arm]").forEach((select) => { select.value = name; });
    if (place) showArm();
    changes.forEach((change) => change());
  };

  document.querySelectorAll("select[data-arm]").forEach((select) => {
    select.replaceChildren(...listed.map((name) => element("option", { value: name }, name)));
    select.value = state.arm;
    select.closest("label").hidden = listed.length < 2;
    select.addEventListener("change", () => { chooseArm(select.value); if (place) remember(); });
  });

  function follow() {
    const asked = new URLSearchParams(window.location.hash.slice(1));
    if (!place || !asked.has("point")) return false;
    if (asked.has("arm") && asked.get("arm") !== state.arm) chooseArm(asked.get("arm"));
    const arm = evidence(state.arm), wanted = asked.get("point");
    if (!arm) return true;
    const isNamed = Object.keys(arm.named).includes(wanted), isPlace = /^\d+$/.test(wanted);
    show(isNamed ? arm.named[wanted] : isPlace ? Number(wanted) : arm.start, false);
    parts.unknown.hidden = isNamed || isPlace;
    parts.unknown.textContent = `${state.arm} has no operating point “${wanted}” on its path; this is its default one.`;
    return true;
  }

  if (place) {
    build();
    showArm();
    if (follow()) document.getElementById("tradeoff").scrollIntoView();
    window.addEventListener("hashchange", follow);
  }
  return { state, changes };
})();
