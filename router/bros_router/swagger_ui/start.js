// `validatorUrl: null`: the description is shown to nobody else.
SwaggerUIBundle({ url: "../api-doc/openapi.json", dom_id: "#page", deepLinking: true, validatorUrl: null });
