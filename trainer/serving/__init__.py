"""The HTTP server of the stage `serve`: OpenAI's chat completions for one model.

Read `app` first: it has the routes and the middleware that checks host, origin and token. `chat` handles one request (`body` and `request`
parse it, `image` and `fetch` load its images), `queue` and `worker` form batches and run the model on its own thread, and `reply` formats
the answer. `endpoint` is the listening address and the access check, `admission` says whether requests are accepted.
"""
