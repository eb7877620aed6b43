"""Parts of ``scripts/zoo.py``: tiny models of every architecture, and what deltaspec must get right on them."""
