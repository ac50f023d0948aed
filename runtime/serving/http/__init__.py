"""The HTTP side of serving: routes, bodies, middleware, and the process around them (server.py).

Does not know how tokens are generated: it calls runtime/serving/generation.py. Start at app.py, then chat.py.
"""
