// What happened to the prompt, and nothing of how it is shown.
// Positions, stages and answer tokens count from 0; step d is the one that ran answer token d - 1,
// and step 0 the prefill.

const story = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const size = data.prompt.length, stages = data.layers.length, steps = data.revived.length;

  // Every call back, in order of steps: {position, stage, step}; and those of each token.
  const revivals = [], revivalsOf = new Map();
  data.revived.forEach((byStage, at) => byStage.forEach((positions, stage) => {
    for (const position of positions) {
      const revival = { position, stage, step: at + 1 };
      revivals.push(revival);
      if (!revivalsOf.has(position)) revivalsOf.set(position, []);
      revivalsOf.get(position).push(revival);
    }
  }));

  // A level a token and step: the last stage that the step chose the token for.
  let chosen = null;
  async function unpack() {
    const packed = Uint8Array.from(atob(data.chosen), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    chosen = new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // In how many stages each token has keys after a step.
  function depths(step) {
    const depth = Uint8Array.from(data.depth);
    for (const one of revivals) if (one.step <= step) depth[one.position] = one.stage + 1;
    return depth;
  }

  // By stage: tokens that the prefill took into it, and those revived up to a step.
  function counts(step) {
    return data.layers.map((layers, stage) => ({
      layers,
      kept: data.depth.filter((depth) => depth > stage).length,
      revived: revivals.filter((one) => one.stage === stage && one.step <= step).length,
    }));
  }

  // Share of (prompt token, layer) pairs computed up to a step.
  function share(step) {
    let pairs = 0, layers = 0;
    for (const { layers: [first, last], kept, revived } of counts(step)) {
      pairs += (kept + revived) * (last - first + 1);
      layers += last - first + 1;
    }
    return pairs / (size * layers);
  }

  return {
    data, size, stages, steps, revivals, unpack, depths, counts, share,
    revivalsOf: (position) => revivalsOf.get(position) ?? [],
    chosenAt: (step) => step && chosen ? chosen.subarray((step - 1) * size, step * size) : new Uint8Array(size),
    isUnpacked: () => chosen !== null,
    isPruned: data.depth.some((depth) => depth < stages),
  };
})();

// What a token looks like: never nothing, and nothing that could move other text about.
function shown([, text, piece]) {
  if (text === "") return `⟨${piece || "?"}⟩`;
  return text.replace(/[\u0000-\u001f\u007f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g, (letter) => {
    if (letter === "\n") return "↵\n";
    if (letter === "\t") return "⇥\t";
    const code = letter.charCodeAt(0);
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// What is shown right now; controls change it, then call update.
const now = { view: "depth", stage: 0, step: 0, filter: "all", cursor: null, matches: [] };
