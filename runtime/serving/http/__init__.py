"""The HTTP side: routes, bodies, middleware. Start at app, then chat."""
