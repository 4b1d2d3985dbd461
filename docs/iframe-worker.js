// A page opened from disk may start no worker: the search runs in a hidden frame instead, on an index that is a script.
// MkDocs Material loads a file of this name where it has one, and would fetch its own from the network otherwise.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }));
      const page = frame.contentDocument;
      page.open();  // or Firefox replaces the empty page later
      page.close();
      this.inside = frame.contentWindow;
      this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = page.body.appendChild(Object.assign(page.createElement("script"), { src: url }));
      this.ready = new Promise(resolve => (script.onload = resolve));
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
