"""A thinker that answers spoken questions in text, and a talker that says the answer."""
