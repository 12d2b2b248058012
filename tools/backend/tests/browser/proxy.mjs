// A proxy to the backend that a check can close and open again.

import { once } from "node:events";
import { connect, createServer } from "node:net";

/** Returns `{ address, open(), close() }`. The proxy starts open. */
export async function proxy(base) {
  const { hostname, port } = new URL(base);
  const sockets = new Set();
  let own = 0;
  let server = null;

  async function open() {
    server = createServer((from) => {
      const to = connect(Number(port), hostname);
      for (const [socket, other] of [
        [from, to],
        [to, from],
      ]) {
        sockets.add(socket);
        socket.on("error", () => other.destroy());
        socket.on("close", () => {
          sockets.delete(socket);
          other.destroy();
        });
        socket.pipe(other);
      }
    });
    server.listen(own, "127.0.0.1");
    await once(server, "listening");
    own = server.address().port;
  }

  async function close() {
    if (!server) return;
    const closed = once(server, "close");
    server.close();
    for (const socket of sockets) socket.destroy();
    await closed;
    server = null;
  }

  await open();
  return { address: `http://127.0.0.1:${own}`, open, close };
}
