// The page: an image goes in, and it shows at which exit it leaves.
import { Network } from "./erde.js";

const ROUNDS = 15;
const LONGEST = 1500; // milliseconds for all rounds
const part = (id) => document.getElementById(id);
const milliseconds = (time) => `${time < 10 ? time.toFixed(2) : time.toFixed(1)} ms`;

let network = null;
let current = null; // the pixels that are shown
let busy = Promise.resolve(); // questions wait for one another

function tell(text, wrong = false) {
  part("state").textContent = text;
  part("state").classList.toggle("wrong", wrong);
}

function element(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function paint(canvas, pixels) {
  const [height, width, channels] = network.about.input_shape;
  canvas.width = width;
  canvas.height = height;
  canvas.classList.toggle("small", width <= 112);
  const data = new ImageData(width, height);
  for (let place = 0; place < width * height; place += 1) {
    for (let color = 0; color < 3; color += 1) data.data[4 * place + color] = pixels[channels * place + (channels === 1 ? 0 : color)];
    data.data[4 * place + 3] = 255;
  }
  canvas.getContext("2d").putImageData(data, 0, 0);
}

/** An image file as the network takes it: the shorter side fitted, the middle kept. A file of that size stays as it is. */
async function read(file) {
  const [height, width, channels] = network.about.input_shape;
  const settings = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, settings);
  const scale = Math.max(height / bitmap.height, width / bitmap.width);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  const [wide, high] = [bitmap.width * scale, bitmap.height * scale];
  context.drawImage(bitmap, (width - wide) / 2, (height - high) / 2, wide, high);
  const shown = context.getImageData(0, 0, width, height).data;
  const pixels = new Uint8Array(height * width * channels);
  for (let place = 0; place < width * height; place += 1) {
    const [red, green, blue] = shown.subarray(4 * place, 4 * place + 3);
    // Pillow's weights for gray.
    if (channels === 1) pixels[place] = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16;
    else pixels.set([red, green, blue], 3 * place);
  }
  return pixels;
}

const median = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

/** Milliseconds of the image with its exits, of each of its stages, and without exits; both take turns. */
async function time(pixels, thresholds) {
  const never = thresholds.map(() => null);
  const early = [];
  const full = [];
  const stages = [];
  const started = performance.now();
  for (let round = 0; round < ROUNDS && (round < 3 || performance.now() - started < LONGEST); round += 1) {
    let began = performance.now();
    const { exits } = await network.answer(pixels, thresholds);
    early.push(performance.now() - began);
    exits.forEach((exit, place) => (stages[place] ??= []).push(exit.milliseconds));
    began = performance.now();
    await network.answer(pixels, never);
    full.push(performance.now() - began);
  }
  return { early: median(early), full: median(full), stages: stages.map(median), rounds: early.length };
}

function showPromise() {
  const point = network.point(part("point").value);
  part("promise").textContent = point.promise ?? point.note ?? "";
  return point;
}

async function show(pixels) {
  current = pixels;
  const point = showPromise();
  paint(part("preview"), pixels);
  const answer = await network.answer(pixels, point.thresholds);
  const timed = await time(pixels, point.thresholds);
  if (current !== pixels) return;
  const count = network.sessions.length;
  part("label").textContent = network.about.classes[answer.label];
  part("probability").textContent = `${(100 * answer.probabilities[answer.label]).toFixed(1)} %`;
  part("left").textContent =
    answer.exit < count - 1 ? `It leaves at exit ${answer.exit}.` : "It goes on to the final exit.";
  part("result").dataset.label = answer.label;
  part("result").dataset.exit = answer.exit;
  const rows = network.about.stages.map((stage, index) => {
    const place = answer.exits.findIndex((exit) => exit.exit === index);
    const row = element("tr");
    const exit = place < 0 ? null : answer.exits[place];
    const final = index === count - 1;
    const verdict = exit === null ? "not run" : exit.leaves ? (final ? "answers" : "leaves here") : "goes on";
    const threshold = exit === null || final ? "" : exit.threshold === null ? "off" : exit.threshold.toFixed(4);
    row.className = exit === null ? "unused" : exit.leaves ? "leaves" : "";
    row.append(
      element("td", `${index}  ${stage.exit_name}`),
      element("td", exit === null || exit.score === null ? "" : exit.score.toFixed(4)),
      element("td", threshold),
      element("td", verdict),
      element("td", exit === null ? "" : milliseconds(timed.stages[place]), "number"),
    );
    return row;
  });
  part("exits").replaceChildren(...rows);
  const longest = Math.max(timed.early, timed.full) || 1;
  part("bars").replaceChildren(
    ...bar("with exits", timed.early, longest, "early"), ...bar("without exits", timed.full, longest, "full"),
  );
  part("timing").textContent = `Medians of ${timed.rounds} turns each. Without exits: ${
    network.takesImage.lastIndexOf(true) > 0 ? "the last network alone" : "all stages, heads included"
  }.`;
  part("result").hidden = false;
  tell(network.warning ?? "", Boolean(network.warning));
}

function bar(name, value, longest, kind) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  svg.setAttribute("aria-hidden", "true");
  shape.setAttribute("class", kind);
  shape.setAttribute("width", `${(100 * value) / longest}%`);
  shape.setAttribute("height", "16");
  shape.setAttribute("rx", "3");
  svg.append(shape);
  return [element("span", name), svg, element("b", milliseconds(value))];
}

function ask(pixels) {
  busy = busy.then(() => show(pixels)).catch((error) => tell(String(error.message ?? error), true));
  return busy;
}

async function choose(files) {
  const file = files[0];
  if (!file) return;
  for (const button of part("samples").children) button.setAttribute("aria-pressed", "false");
  try {
    await ask(await read(file));
  } catch {
    tell(`${file.name} is not an image that this browser reads`, true);
  }
}

/** Whether the stages give here what they gave where they were sealed; beyond it answers may differ. */
async function check(sample, pixels) {
  const logits = (await network.allLogits(pixels)).flat(2);
  const worst = Math.max(...sample.logits.flat(2).map((value, place) => Math.abs(value - logits[place])));
  if (!(worst <= sample.tolerance)) {
    network.warning = `In this browser the stages give logits that differ by up to ${worst.toPrecision(2)} from those that were `
      + "sealed: answers may differ from the bundle's.";
  }
}

const pixelsOf = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** A small image to click on, with its name below it if that says something. */
function offer(name, image, named) {
  const button = element("button");
  button.type = "button";
  button.title = name;
  button.setAttribute("aria-label", name);
  const canvas = document.createElement("canvas");
  paint(canvas, image);
  button.append(canvas);
  if (named) button.append(element("span", name));
  button.addEventListener("click", () => {
    for (const other of part("samples").children) other.setAttribute("aria-pressed", String(other === button));
    ask(image);
  });
  part("samples").append(button);
}

async function start() {
  network = await Network.load();
  const { about } = network;
  document.title = `${about.name}: erde demo`;
  part("name").textContent = about.name;
  part("about").textContent = `${about.classes.length} classes, ${about.stages.length} exits, ${about.precision}, images of ${
    about.input_shape.slice(0, 2).join(" × ")} pixels; exits decide on ${about.rule}.`;
  for (const point of about.operating_points) {
    const option = element("option", point.promise ? `${point.name} (certified)` : point.name);
    option.value = point.name;
    option.selected = point.name === about.default_operating_point;
    part("point").append(option);
  }
  const sample = about.reference_sample;
  const pixels = pixelsOf(sample.images);
  await check(sample, pixels);
  showPromise();
  part("heading").textContent = about.samples.length ? "Samples beside the bundle" : "Noise, made for checking";
  for (const { name, image } of about.samples) offer(name, pixelsOf(image), true);
  if (!about.samples.length) {
    const size = pixels.length / sample.count;
    for (let row = 0; row < sample.count; row += 1) offer(`noise ${row + 1}`, pixels.slice(row * size, (row + 1) * size), false);
  }
  part("file").addEventListener("change", (event) => choose(event.target.files));
  part("point").addEventListener("change", () => (current ? ask(current) : showPromise()));
  for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      part("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
      if (kind === "drop") choose(event.dataTransfer.files);
    });
  }
  tell(network.warning ?? "No image yet: drop one, or click.", Boolean(network.warning));
  // An answer to noise says nothing about the network: nobody is shown one who does not ask for it.
  if (about.samples.length) part("samples").firstChild.click();
  await busy;
}

start()
  .catch((error) => {
    const reason = location.protocol === "file:" ? "a browser runs this page only from a server, such as erde demo BUNDLE --serve" : error.message ?? error;
    tell(`The network cannot be loaded: ${reason}`, true);
  })
  .finally(() => { document.documentElement.dataset.ready = "yes"; });
