"""Tool calls as model families write them: read from a text, spelled in a grammar, shown to a template.

Knows no model, no server and no grammar library; `text/tool_calls.py` is the door.
"""
