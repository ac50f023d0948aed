"""Serving: from a `ServeConfig` to answers over HTTP. Read `app.create_app` first."""
