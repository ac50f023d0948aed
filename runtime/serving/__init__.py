"""Serving: from a `ServeConfig` to answers over HTTP.

settings.py says what a server is, loading.py makes it, lifecycle.py holds its state. generation.py describes
the path of POST /chat; http/ has the routes, engine/ generates tokens. Start at http/app.py, then
http/chat.py, generation.py and engine/protocol.py.
"""
