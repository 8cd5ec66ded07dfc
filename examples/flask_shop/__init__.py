"""A shop without an event loop: Flask, plain sessions, and `def` handlers; an order and its saga are one commit.

gunicorn --workers 2 --threads 4 examples.flask_shop.web:shop
saga coordinator examples.flask_shop.sagas:app
saga participant examples.flask_shop.sagas:app
"""
