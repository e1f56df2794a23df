"""The HTTP server: routes, wire types, server-sent events, metrics, security, and the models that are served.

Floor 6. Everything that decides a token is below it; `errors.py` alone knows status codes. Its libraries come with
`pip install 'mlx-edge[serve]'`; `settings.py` needs none of them.
"""
