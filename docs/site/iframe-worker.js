// The theme searches in a Worker, which browsers refuse to a page that was opened as a file. There a hidden frame takes
// its place: it runs the same script and exchanges the same messages.
"use strict"

if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      // A copy, delivered later, as between real workers.
      const deliver = (target, data) =>
        setTimeout(() => target.dispatchEvent(new MessageEvent("message", { data: structuredClone(data) })))
      this.inside.postMessage = data => deliver(this, data)
      const script = this.inside.document.createElement("script")
      const loaded = new Promise(resolve => (script.onload = resolve))
      this.postMessage = data => loaded.then(() => deliver(this.inside, data))
      this.terminate = () => frame.remove()
      script.src = new URL(url, location.href)
      this.inside.document.body.append(script)
    }
  }
}
