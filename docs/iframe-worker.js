// The search runs in a Worker, which browsers refuse to pages that are opened from disk.
// There this stands in for it: the same script, in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise(resolve => {
        frame.addEventListener("load", () => resolve(this.start(frame, url)), { once: true });
      });
      document.body.append(frame);
    }

    start(frame, url) {
      const inner = frame.contentWindow;
      const script = inner.document.createElement("script");
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      script.src = new URL(url, location.href).href;
      inner.document.body.append(script);
      return new Promise(resolve => {
        script.addEventListener("load", () => resolve(inner), { once: true });
      });
    }

    async postMessage(data) {
      const inner = await this.ready;
      inner.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
  window.Worker = window.IFrameWorker;
}
