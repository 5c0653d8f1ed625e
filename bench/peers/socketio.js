// Socket.IO on Node, WebSocket transport only: every client gets io.emit(name, object).
// npm: socket.io@^4.8
const http = require("node:http");
const { Server } = require("socket.io");

const server = http.createServer((request, response) => {
  let body = "";
  request.setEncoding("utf8");
  request.on("data", (part) => (body += part));
  request.on("end", () => {
    if (request.method === "POST") io.emit("matches", JSON.parse(body));
    response.writeHead(202).end();
  });
});
const io = new Server(server, { transports: ["websocket"], serveClient: false });
server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });
