// One answer on the page: its thoughts and calls folded, its text, and what can be done with it.

import {button, copyButton, element, visible} from "./dom.js";
import {Markdown} from "./markdown.js";

// A fold that is open while its content comes, and then as the user left it.
class Fold {
  constructor(kind) {
    this.title = element("summary");
    this.body = element("div.body");
    this.box = element(`details.${kind}`, "", this.title, this.body);
    this.title.addEventListener("click", () => { this.chosen = true; });
  }

  show(title, open) {
    this.title.textContent = title;
    if (!this.chosen) this.box.open = open;
  }
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

class Call {
  constructor(call, answerWith) {
    this.call = call;
    this.fold = new Fold("call");
    this.text = element("pre");
    this.text.tabIndex = 0;
    this.fold.body.append(this.text);
    this.box = this.fold.box;
    this.answerWith = answerWith;
  }

  show(running, last) {
    this.fold.show(`Call: ${visible(this.call.name)}`, running);
    this.text.textContent = visible(running ? this.call.arguments : pretty(this.call.arguments));
    this.form?.remove();
    if (running) return;
    if (last) this.fold.body.append(this.form = this.resultForm());
    else if (this.call.result !== undefined) this.fold.body.append(this.form = element("pre.result", visible(this.call.result)));
  }

  resultForm() {
    const text = element("textarea"), label = element("label", "Result", text);
    text.rows = 2;
    text.placeholder = "what the function returned";
    text.value = this.call.result ?? "";
    text.addEventListener("input", () => { this.call.result = text.value; });
    return element("div.result", "", label, button("Go on with it", () => {
      this.call.result = text.value;
      this.answerWith();
    }));
  }
}

// Text comes faster than it can be drawn: it is drawn once a frame, and for a fifth of the time at most.
export class Card {
  #cost = 0;
  #waiting = false;
  #done = false;

  // `own`: its author is the model that the column is named after. actions: {regenerate, answerWith, drawn(draw)}, of
  // which the last draws and keeps the end in sight.
  constructor(answer, {author, own}, actions) {
    this.answer = answer;
    this.actions = actions;
    this.thoughts = new Fold("thoughts");
    this.thoughtsText = new Markdown(this.thoughts.body);
    this.place = element("div.text");
    this.text = new Markdown(this.place);
    this.calls = element("div");
    this.note = element("span.note");
    this.copy = copyButton(() => answer.content);
    this.again = button("Regenerate", actions.regenerate, "Ask for this answer anew");
    const foot = element("div.foot", "", this.note, element("div.acts", "", this.copy, this.again));
    this.box = element("article.answer", "", element("h2.author" + (own ? ".same" : ""), author), this.thoughts.box, this.place, this.calls, foot);
    this.thoughts.box.hidden = true;
    this.drawn = [];
  }

  grow() {
    if (this.#waiting || this.#done) return;
    this.#waiting = true;
    setTimeout(() => requestAnimationFrame(() => {
      this.#waiting = false;
      if (!this.#done) this.draw(true, false);
    }), 4 * this.#cost);
  }

  finish(last) {
    this.#done = true;
    this.draw(false, last);
  }

  draw(running, last) {
    const began = performance.now();
    this.actions.drawn(() => this.#draw(running, last));
    this.#cost = performance.now() - began;
  }

  #draw(running, last) {
    const {answer} = this, thinking = running && !answer.content && !answer.calls.length;
    this.place.classList.toggle("running", running);
    this.thoughts.box.hidden = !answer.reasoning;
    if (answer.reasoning) {
      this.thoughts.show(thinking ? "Thinking…" : "Thoughts", thinking);
      this.thoughtsText.show(answer.reasoning, !running);
    }
    this.text.show(answer.content, !running);
    answer.calls.forEach((call, i) => {
      this.drawn[i] ??= new Call(call, this.actions.answerWith);
      if (!this.drawn[i].box.isConnected) this.calls.append(this.drawn[i].box);
      this.drawn[i].show(running, last);
    });
    this.note.textContent = answer.note || (running ? "waiting…" : "");
    this.note.classList.toggle("error", answer.failed);
    this.copy.hidden = running || !answer.content;
    this.again.hidden = running || !last;
  }
}
