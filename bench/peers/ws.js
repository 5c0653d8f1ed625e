// Node and ws, as its README broadcasts: every client gets client.send(text).
// npm: ws@^8.18
const http = require("node:http");
const { WebSocketServer } = require("ws");

const server = http.createServer((request, response) => {
  let body = "";
  request.setEncoding("utf8");
  request.on("data", (part) => (body += part));
  request.on("end", () => {
    if (request.method === "POST") for (const client of sockets.clients) client.send(body);
    response.writeHead(202).end();
  });
});
const sockets = new WebSocketServer({ server });
server.listen({ port: Number(process.argv[2]), host: "127.0.0.1", backlog: 4096 });
