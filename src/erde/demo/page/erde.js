// A bundle in the browser: stages one after another, each only while the image is undecided. The formulas are those of
// erde/policy/rule.py; numbers are doubles here as there.
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = { wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };

const TOP = 4;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const highest = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);
const argmax = (values) => values.indexOf(highest(values));

function logSoftmax(logits, temperature = 1) {
  const most = highest(logits) / temperature;
  const scaled = logits.map((logit) => logit / temperature - most);
  const total = Math.log(sum(scaled.map(Math.exp)));
  return scaled.map((value) => value - total);
}

function exponentials(logits, sharpness) {
  const most = highest(logits) / sharpness;
  const scaled = logits.map((logit) => logit / sharpness - most);
  const powers = scaled.map(Math.exp);
  return [scaled, powers, sum(powers)];
}

const OWN_SCORES = {
  entropy(logits, sharpness) {
    const [scaled, powers, total] = exponentials(logits, sharpness);
    const entropy = Math.log(total) - sum(powers.map((power, place) => power * scaled[place])) / total;
    return 1 - entropy / Math.log(logits.length);
  },
  max_probability: (logits, sharpness) => 1 / exponentials(logits, sharpness)[2],
  margin(logits, sharpness) {
    const [, powers, total] = exponentials(logits, sharpness);
    return (1 - [...powers].sort((a, b) => b - a)[1]) / total;
  },
  energy(logits, sharpness) {
    const [, , total] = exponentials(logits, sharpness);
    return sharpness * (highest(logits) / sharpness + Math.log(total));
  },
};

function agreementRun(labels) {
  const last = labels[labels.length - 1];
  let run = 1;
  while (run < labels.length && labels[labels.length - 1 - run] === last) run += 1;
  return run;
}

function harm(soFar, parameters) {
  const classes = soFar[0].length;
  const logs = soFar.map((logits) => logSoftmax(logits));
  const labels = soFar.map(argmax);
  const own = logs[logs.length - 1];
  const label = labels[labels.length - 1];
  const best = [...own].sort((a, b) => b - a).slice(0, Math.min(TOP, classes));
  const features = [
    -sum(own.map((log) => Math.exp(log) * log)) / Math.log(classes),
    Math.exp(best[0]) - Math.exp(best[1]),
    ...best,
  ];
  for (let exit = 0; exit < soFar.length - 1; exit += 1) features.push(logs[exit][label], Number(labels[exit] === label));
  const odds = parameters.bias + sum(features.map((value, place) => value * parameters.weights[place]))
    + parameters.class_weights[label];
  return 1 / (1 + Math.exp(Math.min(Math.max(odds, -500), 500)));
}

function ensemble(soFar, kind) {
  const each = soFar.map((logits) => logSoftmax(logits));
  const mean = (values) => sum(values) / values.length;
  return each[0].map((_, place) => {
    const logs = each.map((log) => log[place]);
    return kind === "geometric" ? mean(logs) : Math.log(mean(logs.map(Math.exp)));
  });
}

export class Network {
  /** Fetch and compile everything beside this file; `folder` ends in a slash. */
  static async load(folder = new URL("./", import.meta.url).href) {
    const get = async (name) => {
      const response = await fetch(new URL(name, folder));
      if (!response.ok) throw new Error(`${name} is missing here`);
      return response;
    };
    const about = await (await get("network.json")).json();
    const sessions = [];
    for (const stage of about.stages) {
      const content = new Uint8Array(await (await get(stage.file)).arrayBuffer());
      sessions.push(await ort.InferenceSession.create(content, { executionProviders: ["wasm"] }));
    }
    return new Network(about, sessions);
  }

  constructor(about, sessions) {
    this.about = about;
    this.sessions = sessions;
    this.takesImage = about.stages.map((stage, index) => index === 0 || stage.input === "image");
  }

  point(name) {
    return this.about.operating_points.find((point) => point.name === name);
  }

  /** The first stage that runs: with every exit disabled the last network of a chain answers alone. */
  firstStage(thresholds) {
    return thresholds.every((threshold) => threshold === null) ? this.takesImage.lastIndexOf(true) : 0;
  }

  images(pixels) {
    const [height, width, channels] = this.about.input_shape;
    const size = height * width * channels;
    if (!(pixels instanceof Uint8Array) || pixels.length % size !== 0) throw new Error(`expected ${size} bytes an image`);
    return new ort.Tensor("uint8", pixels, [pixels.length / size, height, width, channels]);
  }

  async runStage(index, x) {
    const session = this.sessions[index];
    const outputs = await session.run({ [session.inputNames[0]]: x });
    return [outputs.features, outputs.logits ?? outputs[session.outputNames[0]]];
  }

  /** Logits of every exit for all images, as [exit][image][class]. */
  async allLogits(pixels) {
    const images = this.images(pixels);
    const all = [];
    let features = null;
    for (let index = 0; index < this.sessions.length; index += 1) {
      const [next, logits] = await this.runStage(index, this.takesImage[index] ? images : features);
      const [count, classes] = logits.dims;
      all.push(Array.from({ length: count }, (_, row) => Array.from(logits.data.slice(row * classes, (row + 1) * classes))));
      features = next;
    }
    return all;
  }

  /** The answer for one image; `exits` has a row for each exit that it passed, with the milliseconds of its stage. */
  async answer(pixels, thresholds) {
    const image = this.images(pixels);
    const last = this.sessions.length - 1;
    const exits = [];
    const soFar = [];
    let features = null;
    for (let index = this.firstStage(thresholds); index <= last; index += 1) {
      const started = performance.now();
      const [next, output] = await this.runStage(index, this.takesImage[index] ? image : features);
      features = next;
      const logits = Array.from(output.data);
      soFar.push(logits);
      const threshold = index < last ? thresholds[index] : null;
      const final = index === last;
      const answer = final || this.about.ensemble === "none" || soFar.length === 1 ? logits : ensemble(soFar, this.about.ensemble);
      const score = final || threshold !== null ? this.score(soFar, answer, final) : null;
      const leaves = final || (threshold !== null && score > threshold);
      exits.push({ exit: index, score, threshold, leaves, milliseconds: performance.now() - started });
      if (leaves) {
        const probabilities = logSoftmax(answer, this.about.temperatures[index]).map(Math.exp);
        return { label: argmax(answer), exit: index, probabilities, exits };
      }
    }
    throw new Error("no exit answered");
  }

  score(soFar, answer, final) {
    if (this.about.score === "patience") return agreementRun(soFar.map(argmax));
    if (this.about.score === "harm") return final ? 1 : harm(soFar, this.about.score_parameters[soFar.length - 1]);
    return OWN_SCORES[this.about.score](answer, this.about.sharpness);
  }
}
