"""`/docs` as a reader sees it: in a browser without a network, which needs a Chromium on the PATH."""

import json

import pytest

import headless_browser

pytestmark = pytest.mark.skipif(headless_browser.PROGRAM is None, reason="there is no Chromium on the PATH")

#: Sets what a text area holds as typing would: React looks at the property that it overrides.
TYPE = """
(area, text) => {
    const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value").set;
    set.call(area, text);
    area.dispatchEvent(new Event("input", {bubbles: true}));
}
"""


async def test_page_lists_every_route_and_tries_one_without_a_network(server, tmp_path):
    described = json.loads(server.get("/api-doc/openapi.json"))["paths"]
    async with headless_browser.Browser(tmp_path / "profile") as page:
        await page.open(f"{server.url}/docs")
        await page.wait_for("document.querySelectorAll('.opblock').length > 0")
        listed = await page.evaluate(
            "[...document.querySelectorAll('.opblock')].map(block => ["
            "block.querySelector('.opblock-summary-method').textContent.toLowerCase(),"
            "block.querySelector('.opblock-summary-path').dataset.path])"
        )
        assert sorted(map(tuple, listed)) == sorted(
            (method, path) for path, operations in described.items() for method in operations
        )

        block = "[...document.querySelectorAll('.opblock-post')].find(block => " + (
            "block.querySelector('.opblock-summary-path').dataset.path === '/generate')"
        )
        await page.evaluate(f"{block}.querySelector('.opblock-summary-control').click()")
        await page.wait_for(f"{block}.querySelector('.try-out__btn') !== null")
        await page.evaluate(f"{block}.querySelector('.try-out__btn').click()")
        await page.wait_for(f"{block}.querySelector('textarea.body-param__text') !== null")
        body = json.dumps({"inputs": "Return the", "parameters": {"max_new_tokens": 5}})
        await page.evaluate(f"({TYPE})({block}.querySelector('textarea.body-param__text'), {json.dumps(body)})")
        await page.evaluate(f"{block}.querySelector('.execute').click()")
        status = f"{block}.querySelector('.live-responses-table tbody .response-col_status')?.textContent"
        assert (await page.wait_for(status)).startswith("200")
        answer = await page.evaluate(f"{block}.querySelector('.live-responses-table .microlight').textContent")
        assert json.loads(answer)["generated_text"]

        assert page.requested_urls
        assert all(url.startswith((server.url, "data:", "about:")) for url in page.requested_urls)
        image = await page.screenshot()
    assert image.startswith(b"\x89PNG")
    (tmp_path / "docs.png").write_bytes(image)
