// The prompt's text. One element for each run of tokens that look alike, in blocks which the
// browser lays out only when they are near.

const prompt = (() => {
  const pane = document.getElementById("prompt");
  const BLOCK = 400; // tokens, and more if that ends with a line
  const texts = story.data.prompt.map(shown);
  const starts = new Uint32Array(story.size + 1); // of each token, in the text that is shown
  texts.forEach((text, i) => { starts[i + 1] = starts[i] + text.length; });

  const blocks = [];
  for (let first = 0, end; first < story.size; first = end) {
    end = Math.min(first + BLOCK, story.size);
    const latest = Math.min(first + 2 * BLOCK, story.size);
    let line = end;
    while (line < latest && !texts[line - 1].endsWith("\n")) line++;
    if (texts[line - 1].endsWith("\n")) end = line;
    const element = document.createElement("div");
    element.className = "block";
    pane.append(element);
    blocks.push({ first, end, element, runs: [], key: "" });
  }

  // Shade and underline of each depth, 0: only stage 0, to the last.
  const UNDER = ["dotted", "dashed", "solid", "double", "wavy"];
  function dress(element, depth) {
    const last = Math.max(story.stages - 1, 1);
    element.style.setProperty("--depth", depth / last);
    const isLast = depth === last;
    element.style.setProperty("--under", isLast ? "solid" : UNDER[(depth - 1) % UNDER.length]);
    element.style.setProperty("--thick", isLast ? "2.5px" : `${1 + Math.floor((depth - 1) / UNDER.length)}px`);
    element.classList.toggle("first", depth === 0);
  }

  // Of each token how deep it looks, from 0; the step that revived it, or 0; and whether it is shown.
  function looks() {
    const { view, stage, step, filter } = now, last = story.stages - 1;
    const has = story.depths(step), chosen = view === "chosen" ? story.chosenAt(step) : null;
    const depth = new Uint8Array(story.size), back = new Uint32Array(story.size);
    const hidden = new Uint8Array(story.size);
    for (const one of story.revivals) {
      if (one.step <= step && (stage === 0 || one.stage === stage)) back[one.position] = one.step;
    }
    for (let i = 0; i < story.size; i++) {
      const level = chosen ? chosen[i] : has[i] - 1;
      depth[i] = stage === 0 ? level : level >= stage ? last : 0;
      const isThere = level >= (stage || last);
      hidden[i] = filter === "dropped" ? isThere : filter === "present" ? !isThere : filter === "revived" ? !back[i] : 0;
    }
    return { depth, back, hidden };
  }

  function paint() {
    const { depth, back, hidden } = looks();
    for (const block of blocks) {
      const runs = [];
      for (let first = block.first, i = first; i < block.end; first = i) {
        const isAlike = hidden[first]
          ? (j) => hidden[j]
          : (j) => !hidden[j] && depth[j] === depth[first] && back[j] === back[first];
        while (i < block.end && isAlike(i)) i++;
        runs.push({ first, end: i, depth: depth[first], back: back[first], hidden: hidden[first] });
      }
      const key = runs.map((r) => `${r.end},${r.hidden},${r.depth},${r.back},${r.back === now.step}`).join(" ");
      if (key === block.key) continue;
      block.key = key;
      block.runs = runs;
      block.element.replaceChildren(...runs.map(element));
    }
    mark();
  }

  function element(run) {
    const span = document.createElement("span");
    span.dataset.first = run.first;
    span.dataset.end = run.end;
    if (run.hidden) {
      span.className = "gap";
      span.textContent = ` ⋯${(run.end - run.first).toLocaleString("en")}⋯ `;
      return span;
    }
    span.className = "run";
    span.dataset.depth = run.depth;
    dress(span, run.depth);
    if (run.back) {
      span.classList.add("back");
      span.classList.toggle("now", run.back === now.step);
      span.dataset.step = run.back;
    }
    run.node = document.createTextNode(texts.slice(run.first, run.end).join(""));
    span.append(run.node);
    return span;
  }

  // The last of sorted things whose first position is not after this one.
  function at(sorted, position) {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (sorted[middle].first <= position) low = middle; else high = middle - 1;
    }
    return sorted[low];
  }

  // Where a token is in the page; null: it is hidden.
  function rangeOf(position) {
    const run = at(at(blocks, position).runs, position);
    if (!run.node) return null;
    const range = document.createRange();
    range.setStart(run.node, starts[position] - starts[run.first]);
    range.setEnd(run.node, starts[position + 1] - starts[run.first]);
    return range;
  }

  // The token under a point of the window, or null.
  function under(x, y) {
    let node, offset;
    if (document.caretPositionFromPoint) {
      const caret = document.caretPositionFromPoint(x, y);
      [node, offset] = [caret?.offsetNode, caret?.offset];
    } else {
      const caret = document.caretRangeFromPoint?.(x, y);
      [node, offset] = [caret?.startContainer, caret?.startOffset];
    }
    const first = Number(node?.parentElement?.dataset.first ?? NaN);
    if (node?.nodeType !== Node.TEXT_NODE || Number.isNaN(first) || !pane.contains(node)) return null;
    const run = at(at(blocks, first).runs, first);
    if (run.node !== node) return null;
    // A caret is between two letters; which of them is the point on?
    const candidates = [offset, offset - 1].filter((o) => o >= 0 && o < node.length);
    for (const letter of candidates) {
      const range = document.createRange();
      range.setStart(node, letter);
      range.setEnd(node, letter + 1);
      for (const box of range.getClientRects()) {
        const isIn = x >= box.left && x < box.right && y >= box.top && y < box.bottom;
        if (isIn) return tokenOf(starts[run.first] + letter);
      }
    }
    return null;
  }

  function tokenOf(letter) {
    let low = 0, high = story.size - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (starts[middle] <= letter) low = middle; else high = middle - 1;
    }
    return low;
  }

  // The cursor and what was found, without an element of their own.
  function mark() {
    if (!window.Highlight) return;
    const ranges = (positions) => positions.map(rangeOf).filter((range) => range !== null);
    CSS.highlights.set("cursor", new Highlight(...ranges(now.cursor === null ? [] : [now.cursor])));
    const found = new Highlight(...ranges(now.matches.slice(0, 500).flatMap(({ first, end }) =>
      Array.from({ length: end - first }, (_, i) => first + i))));
    CSS.highlights.set("found", found);
    CSS.highlights.get("cursor").priority = 1;
  }

  function scrollTo(position) {
    const block = at(blocks, position).element;
    const middle = (box) => box.top - window.innerHeight * 0.55;
    const isFar = (box) => box.bottom < 150 || box.top > window.innerHeight - 40;
    if (isFar(block.getBoundingClientRect())) block.scrollIntoView();
    requestAnimationFrame(() => {
      const box = rangeOf(position)?.getBoundingClientRect();
      if (box && isFar(box)) window.scrollBy(0, middle(box));
    });
  }

  // First and last token that can be seen.
  function visible() {
    const boxes = blocks.map((block) => [block, block.element.getBoundingClientRect()]);
    const seen = boxes.filter(([, box]) => box.bottom > 0 && box.top < window.innerHeight);
    if (!seen.length) return [0, 0];
    const [[head, top], [tail, bottom]] = [seen[0], seen.at(-1)];
    const part = (block, box, y) => {
      const share = Math.min(Math.max((y - box.top) / box.height, 0), 1);
      return block.first + share * (block.end - block.first);
    };
    return [part(head, top, 0), part(tail, bottom, window.innerHeight)];
  }

  return { pane, texts, dress, paint, mark, under, scrollTo, visible };
})();
