"""What stands on disk: single files written whole or not at all, the manifests that say what was written, and text
that people wrote, read within bounds.

Bytes come in through ``json_text`` and ``yaml_text``, whose places are checked by ``paths``, and go out through
``atomic``; ``manifest`` seals what went out.
"""
