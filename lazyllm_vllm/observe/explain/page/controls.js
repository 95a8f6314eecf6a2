// What the reader does: sliders, filter, search, pointer and keys.

const control = Object.fromEntries([...document.querySelectorAll("#controls [id]")].map((e) => [e.id, e]));
const tip = document.getElementById("tip");

function update() {
  control.stage.value = now.stage;
  control.step.value = now.step;
  control["stage-is"].textContent = now.stage ? details.layersOf(now.stage) : "all";
  control["step-is"].textContent = now.step
    ? `${now.step}: ran “${details.inLine(story.data.answer[now.step - 1])}”` : "0: read the prompt";
  control.step.setAttribute("aria-valuetext", control["step-is"].textContent);
  control.stage.setAttribute("aria-valuetext", control["stage-is"].textContent);
  prompt.paint();
  details.refresh();
  strip.refresh();
}

function setStep(step) {
  now.step = step;
  update();
}

// Put the cursor on a token and bring it into sight.
function goTo(position) {
  now.cursor = position;
  details.refresh();
  prompt.mark();
  prompt.scrollTo(position);
  strip.refresh();
}

control.stage.max = story.stages - 1;
control.step.max = story.steps;
control.stage.oninput = () => { now.stage = Number(control.stage.value); update(); };
control.step.oninput = () => setStep(Number(control.step.value));
control.view.onchange = () => { now.view = control.view.value; update(); };
control.filter.onchange = () => { now.filter = control.filter.value; update(); };
document.getElementById("controls").onsubmit = (event) => event.preventDefault();

// Search, in the prompt's own text and not in what stands for line ends.
const search = (() => {
  const texts = story.data.prompt.map((token) => token[1].toLowerCase()), text = texts.join("");
  const ends = new Uint32Array(story.size); // in that text, which may be longer than the prompt's
  texts.reduce((sum, one, i) => (ends[i] = sum + one.length), 0);
  let current = -1;

  function tokenAt(letter) { // the first that ends after it
    let low = 0, high = story.size - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > letter) high = middle; else low = middle + 1;
    }
    return low;
  }

  function find() {
    const wanted = control.search.value.toLowerCase();
    now.matches = [];
    current = -1;
    for (let i = wanted ? text.indexOf(wanted) : -1; i >= 0; i = text.indexOf(wanted, i + wanted.length)) {
      now.matches.push({ first: tokenAt(i), end: tokenAt(i + wanted.length - 1) + 1 });
    }
    const kept = now.matches.filter(({ first, end }) => {
      for (let i = first; i < end; i++) if (story.data.depth[i] < story.stages) return false;
      return true;
    }).length;
    control.found.textContent = wanted ? `${now.matches.length} found, ${kept} kept whole` : "";
    prompt.mark();
    strip.refresh();
  }

  function go(by) {
    const { length } = now.matches;
    if (!length) return;
    current = current < 0 && by < 0 ? length - 1 : (current + by + length) % length;
    goTo(now.matches[current].first);
    control.found.textContent = `${current + 1} of ${length}`;
  }

  return { find, go };
})();
control.search.oninput = search.find;
control.search.onkeydown = (event) => {
  if (event.key === "Enter") search.go(event.shiftKey ? -1 : 1);
  if (event.key === "Escape") prompt.pane.focus();
};
control.next.onclick = () => search.go(1);
control.previous.onclick = () => search.go(-1);

prompt.pane.addEventListener("mousemove", (event) => {
  const position = prompt.under(event.clientX, event.clientY);
  tip.hidden = position === null;
  if (position === null) return;
  tip.replaceChildren(...details.ofToken(position));
  const isLow = event.clientY > window.innerHeight * 0.7;
  tip.style.top = isLow ? "auto" : `${event.clientY + 18}px`;
  tip.style.bottom = isLow ? `${window.innerHeight - event.clientY + 12}px` : "auto";
  tip.style.left = `${Math.min(event.clientX + 8, Math.max(window.innerWidth - tip.offsetWidth - 8, 0))}px`;
});
prompt.pane.addEventListener("mouseleave", () => { tip.hidden = true; });
prompt.pane.addEventListener("click", (event) => {
  const position = prompt.under(event.clientX, event.clientY);
  if (position !== null) goTo(position);
});

// Where the cursor goes by a key.
function moved(key) {
  const last = story.size - 1, from = now.cursor ?? -1;
  const depth = story.data.depth, back = [...new Set(story.revivals.map((one) => one.position))].sort((a, b) => a - b);
  let i = from;
  switch (key) {
    case "ArrowRight": return Math.min(from + 1, last);
    case "ArrowLeft": return Math.max(from - 1, 0);
    case "Home": return 0;
    case "End": return last;
    case "]": for (i++; i < last && depth[i] === depth[i - 1]; i++); return Math.min(i, last);
    case "[": for (i--; i > 0 && depth[i] === depth[i - 1]; i--); return Math.max(i, 0);
    case "r": return back.find((position) => position > from) ?? null;
    case "R": return back.findLast((position) => position < from) ?? null;
    default: return null;
  }
}
prompt.pane.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const position = moved(event.key);
  if (position === null) return;
  event.preventDefault();
  goTo(position);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  control.search.focus();
});

window.addEventListener("beforeprint", () => { tip.hidden = true; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", strip.refresh);
update();
story.unpack().then(update);
