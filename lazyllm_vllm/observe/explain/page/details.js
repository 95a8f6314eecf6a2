// Words about one token, one answer token, and the whole.

// An element with texts, elements or lists of them in it.
function make(tag, attributes, ...parts) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...parts.flat());
  return element;
}

const details = (() => {
  const number = (n) => n.toLocaleString("en");
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const inLine = (token) => shown(token).replaceAll("\n", ""); // line ends have their sign
  const word = (at) => make("span", { class: "text" }, inLine(story.data.answer[at]));
  const layersOf = (stage) => {
    const [first, last] = story.data.layers[stage];
    return first === last ? `layer ${first}` : `layers ${first} to ${last}`;
  };
  const lastLayer = story.data.layers.at(-1)[1];

  // What became of a prompt token, as a list of paragraphs.
  function ofToken(position) {
    const [id, text, piece] = story.data.prompt[position];
    const depth = story.data.depth[position], cut = story.data.layers[depth - 1][1];
    const lines = [
      make("p", {}, make("b", {}, `Token ${number(position)}`), ` of ${number(story.size)}: `,
        make("span", { class: "text" }, inLine([id, text, piece])), ` (id ${id}${text === piece ? "" : `, ${piece}`})`),
      make("p", {}, depth === story.stages
        ? `Kept through all ${lastLayer} layers.`
        : `Kept through layer ${cut}, dropped after layer ${cut}.`),
    ];
    for (const [stage, places] of story.data.places.entries()) {
      if (!places[position]) continue;
      const candidates = story.data.depth.filter((d) => d >= stage).length;
      const kept = story.data.depth.filter((d) => d > stage).length;
      lines.push(make("p", {}, `After layer ${story.data.layers[stage - 1][1]}: place ${number(places[position])} `
        + `of ${number(candidates)}, of which ${number(kept)} were kept.`));
    }
    for (const { stage, step } of story.revivalsOf(position)) {
      lines.push(make("p", {}, `↩ Revived in ${layersOf(stage)} at step ${step} by `, word(step - 1), "."));
    }
    return lines;
  }

  // Sorted positions, those side by side together.
  function neighbours(positions) {
    const groups = [];
    for (const position of positions) {
      if (groups.at(-1)?.at(-1) === position - 1) groups.at(-1).push(position);
      else groups.push([position]);
    }
    return groups;
  }

  // What an answer token called back and chose.
  function showStep() {
    const box = document.getElementById("called");
    const at = now.step - 1;
    if (at < 0) {
      box.replaceChildren(make("p", {}, story.steps
        ? "Choose a word to see what it called back." : "No word of the answer was run."));
      return;
    }
    const lines = [make("p", {}, `Step ${now.step} ran `, word(at), " and so found ", word(at + 1), ".")];
    const chosen = story.chosenAt(now.step);
    for (let stage = 1; stage < story.stages; stage++) {
      const back = story.data.revived[at][stage];
      const count = chosen.reduce((sum, level) => sum + (level >= stage), 0);
      const buttons = neighbours(back).slice(0, 200).map(([first, ...rest]) => make("button",
        { type: "button", title: `token ${first}${rest.length ? ` to ${rest.at(-1)}` : ""}`, onclick: () => goTo(first) },
        [first, ...rest].map((position) => inLine(story.data.prompt[position])).join("")));
      lines.push(make("p", {}, `Into ${layersOf(stage)} it called back ${number(back.length)}`
        + `${count ? `, of ${number(count)} that it chose` : ""}${back.length ? ": " : "."}`, buttons));
    }
    box.replaceChildren(...lines);
  }

  const buttons = story.data.answer.map((token, at) => {
    const isRun = at < story.steps;
    const button = make("button", { type: "button", tabindex: -1, "aria-pressed": false }, inLine(token));
    const back = isRun ? story.data.revived[at].flat().length : 0;
    if (back) {
      button.classList.add("called");
      button.dataset.called = back;
    }
    button.title = isRun ? `step ${at + 1}: called back ${back}` : "the last word: it was not run";
    button.disabled = !isRun;
    button.onclick = () => setStep(at + 1);
    return button;
  });
  document.getElementById("answer").append(...buttons);
  document.getElementById("answer").onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by || !story.steps) return;
    event.preventDefault();
    setStep(Math.min(Math.max(now.step + by, 1), story.steps));
    buttons[now.step - 1].focus();
  };

  function showCounts() {
    const head = make("tr", {}, ["layers", "kept", "", "revived"].map((name) => make("th", { scope: "col" }, name)));
    const rows = story.counts(now.step).map(({ layers, kept, revived }, stage) => make("tr",
      { "aria-current": now.stage === stage && stage > 0 },
      make("th", { scope: "row" }, layers.join(" to ")),
      make("td", {}, number(kept)), make("td", {}, percent(kept / story.size)), make("td", {}, number(revived))));
    document.getElementById("counts").replaceChildren(head, ...rows);
    document.getElementById("share").textContent =
      `${percent(story.share(now.step))} of the prompt computed, up to step ${now.step}.`;
  }

  function showLegend() {
    const keys = [];
    for (let depth = 0; depth < story.stages; depth++) {
      const key = make("span", { class: "key" });
      if (now.stage && depth && depth !== story.stages - 1) continue;
      prompt.dress(key, depth);
      const does = now.view === "chosen" ? "chosen for" : "in";
      key.textContent = now.stage
        ? `${depth ? does : `not ${does}`} ${layersOf(now.stage)}`
        : depth === 0 && story.stages > 1
          ? `${now.view === "chosen" ? "not chosen" : "dropped"} after layer ${story.data.layers[0][1]}`
          : `${does} ${now.view === "chosen" ? layersOf(depth) : `layers 1 to ${story.data.layers[depth][1]}`}`;
      keys.push(key);
    }
    keys.push(make("span", { class: "key back", "data-step": "s" }, "revived at step s"));
    if (now.view === "chosen" && !now.step) keys.push(" Step 0, the prefill, chose what was kept: see its depth.");
    if (!story.isPruned) keys.push(" This prompt was not pruned: every stage has all of it.");
    document.getElementById("legend").replaceChildren(...keys);
  }

  function refresh() {
    buttons.forEach((button, at) => {
      button.setAttribute("aria-pressed", at === now.step - 1);
      button.tabIndex = at === Math.max(now.step - 1, 0) ? 0 : -1;
    });
    showStep();
    showCounts();
    showLegend();
    if (now.cursor !== null) document.getElementById("token").replaceChildren(...ofToken(now.cursor));
  }

  document.getElementById("about").textContent =
    `${story.data.model}, ${number(story.size)} prompt tokens, ${number(story.data.answer.length)} in the answer`;
  return { ofToken, layersOf, inLine, refresh };
})();
