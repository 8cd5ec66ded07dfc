"""A shop on FastAPI: an order and its saga are one commit of the request's own session.

python -m examples.fastapi_shop
uvicorn --workers 2 examples.fastapi_shop.web:shop
"""
