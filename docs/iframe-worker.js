// Browsers start no worker from a file. So that search works where the pages are read from a folder,
// this runs the search's script in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      window.addEventListener("message", event => {
        if (event.source !== inside) return
        const copy = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(copy)
        if (this.onmessage) this.onmessage(copy)
      })
      this.ready = new Promise(done => this.frame.addEventListener("load", done))
      inside.document.open()
      inside.document.write(`<html><body><script>
        window.postMessage = data => parent.postMessage(data, "*")
        window.importScripts = (...urls) => urls.reduce((before, url) => before.then(
          () => new Promise((done, failed) => {
            const script = document.createElement("script")
            script.src = url
            script.onload = done
            script.onerror = failed
            document.body.appendChild(script)
          })), Promise.resolve())
        <\/script><script src="${url}"><\/script></body></html>`)
      inside.document.close()
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(
        new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
