"""Damage by the hundred: each module makes mutations of one kind of file and says what the package makes of them."""
