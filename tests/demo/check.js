// Runs beside the page: `window.report` is what it shows and what the networks answer.
import { Network } from "./erde.js";

const failed = [];
window.addEventListener("error", (event) => failed.push(event.message));
window.addEventListener("unhandledrejection", (event) => failed.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", (event) => failed.push(`${event.violatedDirective} ${event.blockedURI}`));

const get = async (name) => (await fetch(name)).json();
const part = (id) => document.getElementById(id);

async function until(ready) {
  for (let turn = 0; turn < 1200 && !ready(); turn += 1) await new Promise((then) => setTimeout(then, 50));
  if (!ready()) throw new Error(`waited in vain: ${ready} ${part("state").textContent}`);
}

async function onThePage(files) {
  await until(() => document.documentElement.dataset.ready);
  const rows = [];
  for (const name of files) {
    const file = new File([await (await fetch(name)).blob()], name, { type: "image/png" });
    const given = new DataTransfer();
    given.items.add(file);
    part("file").files = given.files;
    delete part("result").dataset.exit;
    part("file").dispatchEvent(new Event("change"));
    await until(() => "exit" in part("result").dataset);
    const { label, exit } = part("result").dataset;
    rows.push({
      label: Number(label), exit: Number(exit), name: part("label").textContent, leaves: part("exits").rows[exit].className,
      unused: part("exits").querySelectorAll(".unused").length, bars: part("bars").textContent, state: part("state").textContent,
    });
  }
  return rows;
}

async function answersOf(folder) {
  const network = await Network.load(new URL(`${folder}/`, import.meta.url).href);
  const { images } = await get(`${folder}/images.json`);
  const answers = {};
  for (const point of network.about.operating_points) {
    answers[point.name] = [];
    for (const image of images) {
      const { label, exit, probabilities, exits } = await network.answer(Uint8Array.from(image), point.thresholds);
      answers[point.name].push({ label, exit, probabilities, score: exits[exits.length - 1].score, passed: exits.length });
    }
  }
  return answers;
}

let report;
try {
  const { files, folders } = await get("asked.json");
  const answers = {};
  for (const folder of folders) answers[folder] = await answersOf(folder);
  report = { page: await onThePage(files), answers, isolated: window.crossOriginIsolated };
} catch (error) {
  failed.push(`${error.message} ${error.stack}`);
}
window.report = { ...report, failed };
